"""Compile-time constants of a format for the kernels."""

from functools import lru_cache
from typing import NamedTuple

import torch

from mpq.core.formats import Format
from mpq.core.grids import Grid


class Spec(NamedTuple):
    """A format's compile-time constants: a kernel is compiled once for each distinct value.

    kind: "int" (code - zero), "float" or "table". group: columns that share a scale, 0 for a whole row. offset: the
    code of zero where there are no zero points.
    """

    kind: str
    bits: int
    offset: int
    exponent: int
    mantissa: int
    bias: int
    signed: bool
    fits_fp16: bool
    scale: str
    group: int
    zero_point: bool
    tensor_scale: bool


def _fits_fp16(grid: Grid) -> bool:
    """Whether every value's bits fit a float16, whose top exponent means infinity."""
    return grid.exponent < 5 or (grid.exponent == 5 and grid.specials == "ieee")


@lru_cache(maxsize=1024)
def spec_of(format: Format) -> Spec:
    """The constants of a format with codes."""
    grid = format.grid
    simple_float = grid.family == "float" and grid.exponent < 8 and grid.signed
    kind = "int" if grid.family == "int" else "float" if simple_float else "table"
    return Spec(
        kind, grid.bits, grid.offset, grid.exponent, grid.mantissa, grid.bias, grid.signed,
        kind == "float" and _fits_fp16(grid), format.scale, format.group_size, format.zero_point, format.tensor_scale,
    )  # fmt: skip


MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}  # two halves of 1024, and of 128


def magic_of(spec: Spec, dtype: torch.dtype) -> int:
    """The bits that turn an integer code into a 16-bit float; 0 where codes are decoded otherwise."""
    if spec.kind != "int" or (dtype == torch.bfloat16 and spec.bits == 8):
        return 0
    return MAGIC.get(dtype, 0)
