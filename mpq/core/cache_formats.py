"""The formats of a model's keys and values: what an allocation says of its cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpq.core.cache import cache_name, head_bytes, parse_cache_format, stored_bytes
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer


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
        return 8 * self.token_bytes / sum(entry.params for entry in self.entries)

    @property
    def token_bytes(self) -> int:
        """Bytes that each token adds to a long text, as long as no window drops any."""
        return sum(entry.rows * head_bytes(format, entry.cols) for entry, format in self._pairs)

    @cached_property
    def _pairs(self) -> tuple[tuple[Layer, Format], ...]:
        return tuple(zip(self.entries, self.format_of.values(), strict=True))

    def nbytes(self, context: int, batch: int = 1) -> int:
        """Bytes after `context` tokens of each of `batch` texts."""
        return batch * sum(
            entry.rows * stored_bytes(format, entry.cols, entry.tokens(context)) for entry, format in self._pairs
        )

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
