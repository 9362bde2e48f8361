"""Several formats within one weight, each row in one of them: a format with a name and exact bytes like any other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format

ROWS = "rows"  # granularity of a mix: what shares a scale is up to the row's own format
MOST = 10  # formats of a mix: a row's is one digit
_NAME = re.compile(r"(?P<formats>[^@]+/[^@]+)@(?P<bits>\d{1,2}(\.\d{1,3})?)")


@dataclass(frozen=True)
class Mix(Format):
    """Rows of one weight in `formats`, together at most `bits` stored bits a weight.

    The number of bytes depends on the weight's shape alone, not on the assignment: it is that of the largest mix of the
    two formats next to `bits` that `bits` allows, plus the assignment itself. An `assignment` says of each row, by a
    digit, which of the formats it has; it belongs to one layer and is not part of the name. Fields of `Format` are
    those of the format with the widest grid.

    >>> parse_mix("int2-g64/int3-g64/int4-g64@3").effective_bits(4096, 4096)
    3.0
    """

    formats: tuple[Format, ...] = ()
    bits: float = 0.0
    assignment: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """FORMAT/FORMAT/...@BITS."""
        return f"{'/'.join(format.name for format in self.formats)}@{self.bits:g}"

    @property
    def members(self) -> tuple[Format, ...]:
        """The formats that rows have."""
        return self.formats

    @property
    def is_plain(self) -> bool:
        """No: its groups are not alike."""
        return False

    def groups(self, cols: int) -> int:
        """Scales in a row of the format that has most of them."""
        return max(format.groups(cols) for format in self.formats)

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of a (rows, cols) weight: its rows, each in its format, and the assignment."""
        sizes = sorted(self.row_bytes(cols))
        fixed = self.assignment_bytes(rows)
        limit = round(1000 * self.bits) * rows * cols // 8000 - fixed
        low = max((size for size in sizes if size * rows <= limit), default=sizes[0])
        high = min((size for size in sizes if size > low), default=low)
        raised = min(max(limit - low * rows, 0) // (high - low), rows) if high > low else 0
        return fixed + low * rows + raised * (high - low)

    def row_bytes(self, cols: int) -> list[int]:
        """Stored bytes of one row in each of the formats."""
        return [format.nbytes(1, cols) for format in self.formats]

    def assignment_bytes(self, rows: int) -> int:
        """Stored bytes of the assignment: as many bits a row as tell the formats apart."""
        return -(-rows * self.assignment_bits // 8)

    @property
    def assignment_bits(self) -> int:
        """Bits that tell the formats apart."""
        return max(1, (len(self.formats) - 1).bit_length())

    @property
    def code_bits(self) -> float:
        """Bits of a code on average: the formats' own, interpolated by their stored bits."""
        stored, codes = np.array(sorted((one.effective_bits(), one.grid.bits) for one in self.formats)).T
        return float(np.interp(self.bits, stored, codes))

    def suits(self, rows: int, cols: int) -> bool:
        """Whether the mix is larger than its smallest format and smaller than its largest, for this shape."""
        sizes, inside = self.row_bytes(cols), self.nbytes(rows, cols) - self.assignment_bytes(rows)
        return rows * min(sizes) < inside < rows * max(sizes)

    def assigned(self, rows: int, cols: int) -> NDArray[np.uint8]:
        """The place in `formats` of each row's format, (rows,).

        Raises:
            MpqError: no assignment, one for another shape, or one of other bytes than the mix has.
        """
        if not self.assignment:
            raise MpqError(
                f"{self.name} does not say which row has which format: allocate from a table that was profiled with "
                "granularity 'row', and keep its allocation"
            )
        places = np.frombuffer(self.assignment.encode("ascii", "replace"), np.uint8) - ord("0")
        if len(places) != rows or places.max(initial=0) >= len(self.formats):
            raise MpqError(f"{self.name} has an assignment of {len(places)} rows that does not fit {rows} rows")
        total = int(np.array(self.row_bytes(cols))[places].sum()) + self.assignment_bytes(rows)
        if total != self.nbytes(rows, cols):
            raise MpqError(
                f"{self.name} takes {self.nbytes(rows, cols)} bytes of {rows} x {cols} weights, its assignment {total}"
            )
        return places

    def counts(self, rows: int, cols: int) -> list[int]:
        """Number of rows in each format; MpqError as `assigned`."""
        counted: list[int] = np.bincount(self.assigned(rows, cols), minlength=len(self.formats)).tolist()
        return counted

    def with_counts(self, counts: Sequence[int]) -> "Mix":
        """The mix with rows assigned in the formats' order, for estimates before the assignment is known."""
        return self.with_assignment("".join(str(place) * count for place, count in enumerate(counts)))

    def with_assignment(self, places: "NDArray[np.integer[Any]] | str") -> "Mix":
        """The mix with each row's place in `formats`, (rows,) or as digits."""
        return replace(self, assignment=places if isinstance(places, str) else digits(places))


def digits(places: "NDArray[np.integer[Any]]") -> str:
    """Places of 0 to 9 as text, one digit each."""
    return (np.asarray(places).astype(np.uint8) + ord("0")).tobytes().decode("ascii")


def is_mix(name: str) -> bool:
    """Whether a format's name is spelt as a mix is."""
    return "@" in name


@lru_cache(maxsize=1024)
def parse_mix(name: str) -> Mix:
    """The mix called FORMAT/FORMAT/...@BITS, bits of at most three decimals.

    Raises:
        MpqError: another spelling, an unknown format, or formats that cannot be mixed.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise MpqError(f"unknown mix {name!r}: expected formats and bits, e.g. int2-g64/int3-g64@2.75")
    return mix_of([parse_format(part) for part in match["formats"].split("/")], float(match["bits"]))


def mix_of(formats: Sequence[Format], bits: float) -> Mix:
    """The mix of these formats at so many bits, rounded to three decimals.

    Raises:
        MpqError: less than two formats or more than ten, one twice, or one with something that all rows share.
    """
    bits = round(bits, 3)
    names = [format.name for format in formats]
    if not 2 <= len(formats) <= MOST or len(set(names)) < len(names):
        raise MpqError(f"a mix takes 2 to {MOST} different formats, not {', '.join(names) or 'none'}")
    for format in formats:
        if not mixable(format):
            raise MpqError(f"{format.name} has a scale for the whole tensor and cannot be mixed by rows")
    widest = max(formats, key=lambda format: format.grid.bits)
    return Mix(widest.grid, ROWS, scale=widest.scale, formats=tuple(formats), bits=bits)


def mixable(format: Format) -> bool:
    """Whether rows of a format are independent: no tensor scale, no float copy."""
    return format.granularity not in ("tensor", ROWS) and not format.tensor_scale


def families(formats: Sequence[Format]) -> list[tuple[Format, ...]]:
    """The formats, by rising width, that differ only in their grid: the default formats of a mix.

    Integers and codebooks go together, small floats and grids without a sign are apart.
    """
    members: dict[object, list[Format]] = {}
    for format in formats:
        if mixable(format) and not format.is_float_copy:
            kin = replace(format, grid=formats[0].grid)
            members.setdefault((kin, format.grid.family == "float", format.grid.signed), []).append(format)
    kept = (sorted(set(family), key=lambda format: format.grid.bits) for family in members.values())
    return [tuple(family)[:MOST] for family in kept if len(family) > 1]
