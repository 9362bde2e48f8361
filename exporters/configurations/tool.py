"""What a configuration of another quantizer is made of: how it spells the format of one layer."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mpq.core.errors import MpqError
from mpq.core.formats import Format

Spelling: TypeAlias = Mapping[Any, Any]  # how a tool describes the format of one layer


@dataclass(frozen=True)
class Tool:
    """Another quantizer and the file that configures it.

    `spell` gives a weight format in the tool's words, None where it has none; `write` and `read` turn spellings by
    layer name into the file's text and back, where `read` gives None for layers that stay in floating point.
    """

    name: str
    file: str  # what the tool takes, in words
    spell: Callable[[Format], Spelling | None]
    write: Callable[[Mapping[str, Spelling | None]], str]
    read: Callable[[str, Sequence[str]], Mapping[str, Spelling | None]]
    kinds: tuple[str, ...] = ("linear",)  # layers that it quantizes


def key_of(spelling: Spelling) -> str:
    """The same text for the same spelling, whatever the order and the types of its keys."""
    return json.dumps(json.loads(json.dumps(spelling)), sort_keys=True)


def integer_of(format: Format) -> tuple[int, int, bool] | None:
    """Bits, group size (-1: a channel) and whether symmetric; None for other grids, scales or granularities."""
    plain = format.grid.family == "int" and format.is_plain and format.granularity in ("group", "channel")
    if not plain or format.scale not in ("fp16", "bf16", "fp32") or not (format.zero_point or format.grid.signed):
        return None
    return format.grid.bits, format.group_size or -1, not format.zero_point


def usual_spelling(spellings: Mapping[str, Spelling | None]) -> dict[str, Any]:
    """The spelling of most layers."""
    counts = Counter(key_of(spelling) for spelling in spellings.values() if spelling is not None)
    if not counts:
        raise MpqError("this allocation leaves every layer in floating point: there is nothing to configure")
    usual: dict[str, Any] = json.loads(counts.most_common(1)[0][0])
    return usual
