"""Checksums inside tables, frontiers and allocations: a file edited by hand loads with a warning."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any
from zlib import crc32

log = logging.getLogger(__name__)

CHECKSUM = "checksum"  # key of a file's header
EDITED = "edited"  # provenance key of a file that was changed after it was written


def checksum(header: Mapping[str, Any], body: str = "") -> str:
    """CRC-32 of JSON values (key order matters) and of the text that follows them; 8 hexadecimal digits."""
    values = json.loads(json.dumps(dict(header)))  # as read back from a file
    return f"{crc32((json.dumps(values) + body).encode()):08x}"


def check_edits(
    path: str | os.PathLike[str], recorded: object, header: Mapping[str, Any], body: str = ""
) -> dict[str, Any]:
    """Warn when a file was edited or has no checksum; return what to add to its provenance.

    Args:
        path: the file.
        recorded: the checksum in the file, None where it has none.
        header: its JSON values without the checksum.
        body: the text that follows them.
    """
    if recorded is None:
        log.warning("%s has no checksum, so edits cannot be detected: save it again to add one", path)
        return {}
    if recorded != checksum(header, body):
        log.warning("%s was edited after it was written (its checksum differs): its values are used as they are", path)
        return {EDITED: True}
    return {}
