"""Parts of another quantizer's configuration: its spelling of one layer's format."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters.rules import GGUF_TYPES, MLX_BITS, MLX_GROUPS

Spelling: TypeAlias = Mapping[Any, Any]  # how a tool describes the format of one layer


@dataclass(frozen=True, eq=False)
class Tool:
    """Another quantizer and the file that configures it.

    `spell` gives the tool's spelling of a weight format, None if it has none; `write` and `read` convert spellings by
    layer name to the file's text and back; `read` gives None for layers that stay in floating point.
    """

    name: str
    file: str  # description of the file
    spell: Callable[[Format], Spelling | None]
    write: Callable[[Mapping[str, Spelling | None]], str]
    read: Callable[[str, Sequence[str]], Mapping[str, Spelling | None]]
    kinds: tuple[str, ...] = ("linear",)  # layers that it quantizes
    block: Callable[[Format], int] = lambda format: format.group_size  # what rows must divide into; 0: anything
    marks: tuple[str, ...] = ()  # one of these keys is at the top level of its files, or one below
    fuses: bool = True  # its servers compute tied layers as one
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The well-known formats that it supports."""
        return tuple(known_formats(self).values())

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Why it cannot give a layer a scheme, in half a sentence; "" where it can."""
        if scheme.mix is not None:
            return "all rows of a layer have one format there"
        if scheme.activation is not None:
            return "configurations describe weights alone"
        if scheme.weight.is_float_copy:
            return ""
        if layer.kind not in self.kinds or (layer.aliases and self.kinds == ("linear",)):
            return f"it quantizes {' and '.join(self.kinds)} layers with weights of their own"
        if self.spell(scheme.weight) is None:
            return "it has no such format"
        block = self.block(scheme.weight)
        return f"rows of {layer.cols} weights do not divide into {block}" if block and layer.cols % block else ""


@lru_cache
def known_formats(tool: Tool) -> dict[str, str]:
    """Scheme by spelling, for the well-known formats."""
    groups = ("-channel", *(f"-g{size}" for size in (16, 32, 64, 128, 256)))
    integers = [f"int{bits}{group}{asym}" for bits in range(2, 9) for group in groups for asym in ("", "-asym")]
    minima = [f"uint{bits}-g{size}-mfp16" for bits in MLX_BITS for size in MLX_GROUPS]
    others = ("mxfp4", "mxfp8-e4m3", "nvfp4", "fp8-e4m3", "fp8-e4m3-channel", *GGUF_TYPES)
    known: dict[str, str] = {}
    for name in (*minima, *integers, *others):
        spelling = tool.spell(parse_scheme(name).weight)
        if spelling is not None:
            known.setdefault(key_of(spelling), parse_scheme(name).name)
    return known


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
    """The most frequent spelling."""
    counts = Counter(key_of(spelling) for spelling in spellings.values() if spelling is not None)
    if not counts:
        raise MpqError("this allocation quantizes no layer: there is nothing to configure")
    usual: dict[str, Any] = json.loads(counts.most_common(1)[0][0])
    return usual
