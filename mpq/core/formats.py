"""Number formats: an element grid, a scale and a granularity, with names that parse and print the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from mpq.core.errors import MpqError, nearest_names
from mpq.core.grids import (
    CODEBOOKS,
    FLOAT_COPIES,
    INTEGER_SCALES,
    SCALES,
    Grid,
    float_grid,
    int_grid,
)
from mpq.core.registry import load_plugin, plugins_of


@dataclass(frozen=True)
class Format:
    """Storage format of one weight's numbers.


    The weight is a matrix (rows, cols), one row for each output channel. `granularity` says how many elements share a
    scale: "group" (`group_size` neighbours of a row; the last group of a row may be shorter), "channel" (a
    row), "tensor" (all), or "none" (16- and 32-bit floats, stored as they are). `scale` is the scale's own number
    format. `zero_point` adds an integer zero point for each scale. `tensor_scale` adds one float32 scale for the whole
    tensor, by which group scales are multiplied (NVFP4). `minimum` is the number format of an offset that is added to
    each group ("" for none). With `super_group`, that many neighbouring groups of a row form a super-block: their
    scales and minima are integers times a float16 scale each (ggml's K types).

    >>> parse_format("int4-g128-asym").effective_bits(4096, 4096)
    4.15625
    """

    grid: Grid
    granularity: str = "tensor"
    group_size: int = 0
    scale: str = "fp32"
    zero_point: bool = False
    tensor_scale: bool = False
    minimum: str = ""
    super_group: int = 0

    @classmethod
    def parse(cls, name: str) -> "Format":
        """The format of this name; see `parse_format`."""
        return parse_format(name)

    @property
    def name(self) -> str:
        """The canonical name: `parse_format(format.name) == format`."""
        return _ALIAS_OF.get(self) or _spell(self)

    def __str__(self) -> str:
        return self.name

    @property
    def is_float_copy(self) -> bool:
        """Whether weights are stored as 16- or 32-bit floats, without codes and scales."""
        return self.granularity == "none"

    @property
    def is_plain(self) -> bool:
        """Whether a group has a scale and at most a zero point: no minimum and no super-blocks."""
        return not self.minimum and not self.super_group

    @property
    def members(self) -> tuple["Format", ...]:
        """The formats that rows have: this one; several in a mix (`mpq.core.mix`)."""
        return (self,)

    @property
    def code_bits(self) -> float:
        """Bits of a code."""
        return self.grid.bits

    def groups(self, cols: int) -> int:
        """Scales in a row of `cols` weights; 1 where the tensor has one scale, 0 for a float copy."""
        if self.granularity == "group":
            return -(-cols // self.group_size)
        return 0 if self.is_float_copy else 1

    def super_groups(self, cols: int) -> int:
        """Super-blocks in a row of `cols` weights."""
        return -(-self.groups(cols) // self.super_group) if self.super_group else 0

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of a (rows, cols) weight: codes, scales, zero points and minima.

        Each row's codes, zero points, scales and minima are padded to whole bytes.
        """
        codes = rows * _bytes(cols * self.grid.bits)
        if self.is_float_copy:
            return codes
        scale_rows = 1 if self.granularity == "tensor" else rows
        groups = self.groups(cols)
        widths = [SCALES[self.scale].bits, self.grid.bits * self.zero_point]
        widths.append(SCALES[self.minimum].bits if self.minimum else 0)
        tables = scale_rows * sum(_bytes(groups * width) for width in widths)
        supers = 2 * rows * self.super_groups(cols) * (2 if self.minimum else 1)
        return codes + tables + supers + (4 if self.tensor_scale else 0)

    def effective_bits(self, rows: int = 4096, cols: int = 4096) -> float:
        """Average stored bits for each weight of a (rows, cols) matrix."""
        return 8 * self.nbytes(rows, cols) / (rows * cols)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _spell(format: Format) -> str:
    grid = format.grid
    if format.is_float_copy:
        return grid.name
    signed = int_grid(grid.bits) if format.zero_point else grid
    name = f"fp{grid.bits}-{grid.name}" if grid.family == "float" else signed.name
    if format.granularity != "tensor":
        name += f"-g{format.group_size}" if format.granularity == "group" else "-channel"
    if format.zero_point:
        name += "-asym"
    if format.scale != _default_scale(format.granularity):
        name += f"-s{format.scale}"
    name += f"-m{format.minimum}" if format.minimum else ""
    name += f"-b{format.super_group}" if format.super_group else ""
    return name + ("-ts" if format.tensor_scale else "")


def _default_scale(granularity: str) -> str:
    return "fp32" if granularity == "tensor" else "fp16"


def _block(grid: Grid, group_size: int, scale: str, tensor_scale: bool = False) -> Format:
    return Format(grid, "group", group_size, scale, tensor_scale=tensor_scale)


def _super_block(grid: Grid, group_size: int, scale: str, minimum: str = "") -> Format:
    return Format(grid, "group", group_size, scale, minimum=minimum, super_group=256 // group_size)


# Standards that fix grid, group and scale together: OCP MX 1.0 section 5, NVIDIA's NVFP4, ggml's types of llama.cpp.
# MXINT8's elements are k/64 in the specification; here they are k, with scales 2**6 times smaller.
ALIASES: dict[str, Format] = {
    "mxfp4": _block(float_grid(2, 1), 32, "e8m0"),
    "mxfp6-e3m2": _block(float_grid(3, 2), 32, "e8m0"),
    "mxfp6-e2m3": _block(float_grid(2, 3), 32, "e8m0"),
    "mxfp8-e4m3": _block(float_grid(4, 3), 32, "e8m0"),
    "mxfp8-e5m2": _block(float_grid(5, 2), 32, "e8m0"),
    "mxint8": _block(int_grid(8), 32, "e8m0"),
    "nvfp4": _block(float_grid(2, 1), 16, "e4m3", tensor_scale=True),
    "q2_k": _super_block(int_grid(2, signed=False), 16, "uint4", "uint4"),
    "q3_k": _super_block(int_grid(3), 16, "int6"),
    "q4_k": _super_block(int_grid(4, signed=False), 32, "uint6", "uint6"),
    "q5_k": _super_block(int_grid(5, signed=False), 32, "uint6", "uint6"),
    "q6_k": _super_block(int_grid(6), 16, "int8"),
    "q4_1": Format(int_grid(4, signed=False), "group", 32, "fp16", minimum="fp16"),
    "q5_1": Format(int_grid(5, signed=False), "group", 32, "fp16", minimum="fp16"),
    "iq4_nl": _block(CODEBOOKS["iq4nl"], 32, "fp16"),
    **{name: Format(grid, "none", scale="") for name, grid in FLOAT_COPIES.items()},
}
_ALIAS_OF = {format: name for name, format in ALIASES.items()}
SYNONYMS = {"q4_0": "int4-g32", "q5_0": "int5-g32", "q8_0": "int8-g32", "f16": "fp16", "f32": "fp32"}  # ggml's
SYNONYMS |= {name.upper(): SYNONYMS.get(name, name) for name in (*SYNONYMS, *ALIASES)}  # as llama.cpp shows them

_NAME = re.compile(
    r"(?P<grid>u?int[2-8]|nf4|iq4nl|nl[2-5]|fp(?P<bits>[3-8])-e(?P<exponent>\d)m(?P<mantissa>\d))"
    r"(-(?P<granularity>tensor|channel|g(?P<group>[1-9]\d*)))?"
    r"(?P<asym>-asym)?(-s(?P<scale>[a-z0-9]+))?(-m(?P<minimum>[a-z0-9]+))?(-b(?P<block>[1-9]\d*))?(?P<ts>-ts)?"
)

_EXAMPLES = (
    *(f"int{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(f"int{bits}-g128-asym" for bits in (2, 3, 4, 8)),
    *(f"int{bits}-channel" for bits in (2, 3, 4, 5, 6, 8)),
    "int8", *(f"nl{bits}-g64" for bits in (2, 3, 4, 5)),
    "nf4-g64", "fp4-e2m1-g32", "fp6-e3m2-channel", "fp6-e2m3-channel",
    "fp8-e4m3", "fp8-e4m3-channel", "fp8-e5m2", "fp8-e5m2-channel", *ALIASES,
)  # fmt: skip


@lru_cache(maxsize=1024)
def parse_format(name: str) -> Format:
    """The format called `name`.

    Grammar: GRID[-tensor|-channel|-gN][-asym][-sSCALE][-mMINIMUM][-bN][-ts] with GRID one of int2..int8, uint2..uint8,
    nl2..nl5, nf4, iq4nl, fpB-eXmY; or the name of a standard format (mxfp4, nvfp4, q4_k, bf16, ...). Without a
    granularity the tensor has one scale; -bN makes super-blocks of N groups, whose scales and minima are integers.

    Raises:
        MpqError: an unknown name, with the nearest known ones.

    >>> parse_format("int4-g128").effective_bits(), parse_format("nvfp4").effective_bits(4096, 4096) > 4.5
    (4.125, True)
    """
    name = SYNONYMS.get(name, name)
    if name in ALIASES:
        return ALIASES[name]
    match = _NAME.fullmatch(name)
    if match is None:
        plugin = _plugins().get(name)
        if plugin is not None:
            return plugin
        raise MpqError(f"unknown format {name!r}: {nearest_names(name, FORMATS)} ('mpq formats' lists the grammar)")
    grid = _grid(name, match)
    granularity = (match["granularity"] or "tensor").rstrip("0123456789")
    granularity = "group" if granularity == "g" else granularity
    scale = match["scale"] or _default_scale(granularity)
    if scale not in SCALES:
        raise MpqError(f"invalid scale type {scale!r} in format {name!r}: expected one of {', '.join(SCALES)}")
    format = Format(
        grid, granularity, int(match["group"] or 0), scale, tensor_scale=bool(match["ts"]),
        minimum=match["minimum"] or "", super_group=int(match["block"] or 0),
    )  # fmt: skip
    _check_tables(name, format)
    if not match["asym"]:
        return format
    if not format.is_plain:
        raise MpqError(f"format {name!r} cannot have a zero point beside a minimum or super-blocks: leave out -asym")
    if grid.family != "int" or not grid.signed:
        raise MpqError(f"format {name!r} cannot have a zero point: only int2 to int8 take -asym")
    if scale in ("e8m0", "e4m3", "ue5m3"):
        raise MpqError(f"format {name!r} cannot have a zero point with {scale} scales: use fp16, bf16 or fp32")
    return replace(format, grid=int_grid(grid.bits, signed=False), zero_point=True)


def _check_tables(name: str, format: Format) -> None:
    """Check that integer scales and minima occur in super-blocks only."""
    if format.super_group and (format.granularity != "group" or format.tensor_scale):
        raise MpqError(f"format {name!r} cannot have super-blocks: they are made of groups (-gN), without -ts")
    if (format.scale in INTEGER_SCALES) != bool(format.super_group):
        kinds = ", ".join(INTEGER_SCALES)
        raise MpqError(
            f"invalid scale type {format.scale!r} in format {name!r}: {kinds} go with super-blocks (-bN) alone"
        )
    if not format.minimum:
        return
    expected = [kind for kind in INTEGER_SCALES if kind[0] == "u"] if format.super_group else [*FLOAT_COPIES]
    if format.minimum not in expected or format.grid.family != "int" or format.grid.signed or format.tensor_scale:
        raise MpqError(
            f"format {name!r} cannot have the minimum {format.minimum!r}: uint grids take {', '.join(expected)}"
        )


def _grid(name: str, match: re.Match[str]) -> Grid:
    if match["grid"] in CODEBOOKS:
        return CODEBOOKS[match["grid"]]
    if match["exponent"] is None:
        return int_grid(int(match["grid"][-1]), signed=not match["grid"].startswith("u"))
    bits, exponent, mantissa = (int(match[field]) for field in ("bits", "exponent", "mantissa"))
    if 1 + exponent + mantissa != bits or exponent < 1:
        raise MpqError(
            f"invalid format {name!r}: a sign, {exponent} exponent and {mantissa} mantissa bits are not {bits} bits"
        )
    return float_grid(exponent, mantissa)


@lru_cache(maxsize=1)
def _plugins() -> Mapping[str, Format]:
    return {name: load_plugin(point) for name, point in plugins_of("mpq.formats").items()}


# Default candidates of a search, 2 to 8 bits, that every backend of ours runs.
DEFAULT_FORMATS = (
    "nl2-g32", "nl2-g64", "nl3-g32", "nl3-g64", "nl3-g128", "nl4-g32", "nl4-g64", "nl4-g128", "nl5-g64", "nl5-g128",
    "int6-g128", "int8-channel",
)  # fmt: skip
# The same where rows of a layer may differ: shorter groups are then not worth their scales (SmolLM2, `bench_rows`).
ROW_FORMATS = tuple(name for name in DEFAULT_FORMATS if not name.endswith("-g32"))
FORMATS: dict[str, Format] = {}  # well-known names; parse_format accepts many more
FORMATS.update({name: parse_format(name) for name in _EXAMPLES})
