"""Formats of cached keys and values: one vector for each head and token, rounded as it arrives.

A vector is a row of its own, so whatever it needs to be read is stored with it. A scale for a whole tensor, which would
have to be known before its tokens, is one: fp8-e4m3 is a cast, and nvfp4 has its group scales alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format
from mpq.core.grids import int_grid
from mpq.core.layer import Layer
from mpq.core.mix import is_mix

# Candidates of a search, by rising bytes of a head of 64.
CACHE_FORMATS = (
    "int2-asym", "int2-g16-se4m3", "int2-g32-asym", "int3-asym", "int3-g16-se4m3", "int3-g32-asym", "int4-asym",
    "int4-g32-asym", "int5-asym", "int6-asym", "int8-token", "fp16",
)  # fmt: skip
FLOAT_CACHE = "fp16"  # what a cache holds that is not quantized
EVERY = ("*",)  # of targets: all formats of a cache
ZERO = "fp16"  # number format of the zero that a code of 0 stands for


@lru_cache(maxsize=256)
def parse_cache_format(name: str) -> Format:
    """The format of cached vectors called `name`.

    Names are those of `mpq.core.formats`, where "token" is the granularity "channel", and the one of integers and
    codebooks when there is none. With -asym a scale has a float16 zero beside it, as in TurboMind (arXiv 2508.15601),
    which becomes the format's minimum: a number is code * scale + zero.

    Raises:
        MpqError: an unknown name, or a format with super-blocks or of mixed rows.

    >>> parse_cache_format("int4-g32-asym").minimum, parse_cache_format("int3").granularity
    ('fp16', 'channel')
    """
    if is_mix(name):
        raise MpqError(f"a cache cannot have the mix {name!r}: name one format, such as int4-g32-asym")
    format = parse_format(name.replace("-token", "-channel"))
    if format.super_group:
        raise MpqError(f"a cache cannot have the super-blocks of {name!r}: name another format, such as int4-g32-asym")
    if format.granularity == "tensor" and format.grid.family != "float":
        format = replace(format, granularity="channel", scale="fp16")
    if format.zero_point:
        format = replace(format, zero_point=False, minimum=ZERO)
    return format


def cache_name(format: Format) -> str:
    """The canonical name: `parse_cache_format(cache_name(format)) == format`."""
    if format.minimum == ZERO and format.grid == int_grid(format.grid.bits, signed=False):
        signed = int_grid(format.grid.bits)
        return cache_name(replace(format, grid=signed, minimum="")) + "-asym"
    return format.name.replace("-channel", "-token")


def affine(bits: int) -> Format:
    """Integers with a float16 scale and zero for each vector: TurboMind's formats of 1 to 8 bits."""
    return Format(int_grid(bits, signed=False), "channel", scale="fp16", minimum=ZERO)


def head_bytes(format: Format, width: int) -> int:
    """Stored bytes of one vector.

    >>> [head_bytes(parse_cache_format(name), 64) for name in ("fp16", "fp8-e4m3", "int4-asym", "nvfp4")]
    [128, 64, 36, 36]
    """
    whole = 4 * format.tensor_scale + 4 * (format.granularity == "tensor")
    return format.nbytes(1, width) - whole


@dataclass(frozen=True)
class CacheFormats:
    """The format of every attention layer's keys and values.

    Raises:
        MpqError: not one known format for each entry.
    """

    entries: tuple[Layer, ...]
    names: tuple[str, ...]  # canonical names of formats, one for each entry

    def __post_init__(self) -> None:
        if len(self.entries) != len(self.names):
            raise MpqError(f"expected one cache format for each of {len(self.entries)} entries, not {len(self.names)}")
        object.__setattr__(self, "names", tuple(cache_name(parse_cache_format(name)) for name in self.names))

    @classmethod
    def uniform(cls, entries: tuple[Layer, ...], name: str) -> "CacheFormats":
        """One format for all."""
        return cls(entries, (name,) * len(entries))

    @property
    def format_of(self) -> dict[str, Format]:
        """Format by entry name."""
        return {one.name: parse_cache_format(name) for one, name in zip(self.entries, self.names, strict=True)}

    @property
    def bits(self) -> float:
        """Stored bits of a cached number, scales counted, averaged over all entries."""
        return 8 * self.nbytes(1) / sum(entry.params for entry in self.entries)

    @cached_property
    def _token_bytes(self) -> tuple[int, ...]:
        formats = self.format_of
        return tuple(entry.rows * head_bytes(formats[entry.name], entry.cols) for entry in self.entries)

    def nbytes(self, context: int, batch: int = 1) -> int:
        """Bytes after `context` tokens of each of `batch` texts."""
        pairs = zip(self._token_bytes, self.entries, strict=True)
        return batch * sum(size * entry.tokens(context) for size, entry in pairs)

    def tokens_in(self, memory: float, batch: int = 1) -> int:
        """The longest context that this memory holds for each of `batch` texts; -1 where windows never fill it."""
        if (
            all(entry.window for entry in self.entries)
            and self.nbytes(max(e.window for e in self.entries), batch) <= memory
        ):
            return -1
        low, high = 0, 1
        while self.nbytes(high, batch) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.nbytes(middle, batch) <= memory else (low, middle)
        return low

    def to_json(self) -> dict[str, Any]:
        """By entry name; the inverse of `from_json`."""
        return {
            entry.name: {"format": name, "heads": entry.rows, "width": entry.cols, "window": entry.window}
            for entry, name in zip(self.entries, self.names, strict=True)
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> "CacheFormats":
        """KeyError, TypeError or ValueError for invalid values."""
        entries = tuple(
            Layer(name, name.rpartition(".")[2], int(own["heads"]), int(own["width"]), window=int(own["window"]))
            for name, own in values.items()
        )
        return cls(entries, tuple(str(own["format"]) for own in values.values()))
