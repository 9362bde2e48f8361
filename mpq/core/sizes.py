"""Sizes as text: 500MB, 1.5GiB or a number of bytes."""

import math
import re
from numbers import Real

from mpq.core.errors import MpqError

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*")


def parse_size(size: float | str) -> float:
    """Bytes of a size.

    Raises:
        MpqError: an invalid size.

    >>> parse_size("500MB"), parse_size("1.5 KiB"), parse_size(4096)
    (500000000.0, 1536.0, 4096.0)
    """
    match = SIZE.fullmatch(size.lower()) if isinstance(size, str) else None
    if match is not None and match[2] in UNITS:
        return float(match[1]) * UNITS[match[2]]
    if isinstance(size, Real) and math.isfinite(size):
        return float(size)
    raise MpqError(f"invalid size {size!r}: expected e.g. 500MB, 1.5GB or a number of bytes")
