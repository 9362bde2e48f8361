"""Tables, frontiers and allocations carry their own checksum: a file edited by hand still loads, with a warning."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any
from zlib import crc32

log = logging.getLogger(__name__)

CHECKSUM = "checksum"  # key of a file's header
EDITED = "edited"  # key of the provenance: the file was changed after it was written


def checksum(header: Mapping[str, Any], body: str = "") -> str:
    """CRC-32 of JSON values, keys in their order, and of the text that follows them; 8 hexadecimal digits."""
    values = json.loads(json.dumps(dict(header)))  # as they come back from a file
    return f"{crc32((json.dumps(values) + body).encode()):08x}"


def check_edits(
    path: str | os.PathLike[str], noted: object, header: Mapping[str, Any], body: str = ""
) -> dict[str, Any]:
    """Warn when a file is not as it was written, or when nothing says whether it is; what to add to its provenance.

    Args:
        path: the file.
        noted: the checksum that it holds, None without one.
        header: its JSON values without the checksum.
        body: the text that follows them.
    """
    if noted is None:
        log.warning("%s has no checksum, so nothing tells whether it was edited: save it again to add one", path)
        return {}
    if noted != checksum(header, body):
        log.warning("%s was edited after it was written (its checksum differs): its values are used as they are", path)
        return {EDITED: True}
    return {}
