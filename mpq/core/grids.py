"""Element grids: the values of a number format's codes, as data.

A grid maps unsigned codes to values. Integers are offset-binary (int4: code 0 is -8, code 8 is 0), unsigned integers
are the value itself, floats are the standard's bit pattern, codebooks are indices in ascending order of value.
Sources: OCP 8-bit floating point (OFP8) 1.0 for e4m3 and e5m2; OCP Microscaling (MX) 1.0, section 5.3 for e3m2, e2m3,
e2m1 and e8m0; QLoRA (arXiv 2305.14314, appendix E) for nf4; ggml's `kvalues_iq4nl` for iq4_nl; nl2 to nl5 are our own
(`experiments/benchmarks/bench_codebooks.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# QLoRA, appendix E: sixteen quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# ggml's non-linear 4 bits: finer around zero, and longer below it than above.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Levels of least squared error in groups of 64 that share a scale, in 127ths: finer around zero than integers, and
# longer at one end, which a scale of either sign turns to the side of the group's largest number. Fitted to a
# t-distribution with 15 degrees of freedom, whose tails are those of a language model's weights.
NON_LINEAR = (
    (-91, -19, 42, 127),
    (-97, -57, -29, -6, 17, 42, 74, 127),
    (-100, -75, -57, -42, -30, -19, -8, 2, 12, 22, 33, 45, 58, 74, 96, 127),
    (
        -115, -94, -80, -69, -60, -52, -45, -39, -33, -27, -22, -16, -11, -6, -1, 3,
        8, 13, 18, 22, 27, 33, 38, 44, 50, 57, 64, 73, 82, 94, 110, 127,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The values of a number format's codes.

    family: "int", "float", "codebook", or "exponent" (e8m0: powers of two, no sign, no zero).
    specials (floats): "ieee": the top exponent means infinity or NaN; "fn": only the all-ones code is NaN;
    "none": every code is a finite number.
    """

    name: str
    bits: int
    family: str
    signed: bool = True
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    specials: str = "none"
    codebook: tuple[float, ...] = ()

    def values(self) -> NDArray[np.float64]:
        """Value of every code, (2**bits,), NaN where a code is not a finite number; for grids of up to 16 bits."""
        return _values(self).copy()

    @property
    def offset(self) -> int:
        """Code of the value zero in an integer grid."""
        return 2 ** (self.bits - 1) if self.family == "int" and self.signed else 0

    @property
    def max(self) -> float:
        """Largest finite value."""
        return _extremes(self)[1]

    @property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return _extremes(self)[0]

    @property
    def smallest(self) -> float:
        """Smallest positive value (the smallest subnormal of a float)."""
        return _extremes(self)[2]

    @property
    def has_zero(self) -> bool:
        """Whether some code is zero."""
        return self.family in ("int", "float") or 0.0 in self.codebook

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): `emax` of the MX specification, section 6.3."""
        return math.frexp(self.max)[1] - 1


@lru_cache(maxsize=64)
def _extremes(grid: Grid) -> tuple[float, float, float]:
    """Smallest, largest and smallest positive value."""
    if grid.bits > 16:
        info = np.finfo(np.float32)
        return float(info.min), float(info.max), float(info.smallest_subnormal)
    values = grid.values()
    return float(np.nanmin(values)), float(np.nanmax(values)), float(np.nanmin(np.where(values > 0, values, np.nan)))


@lru_cache(maxsize=64)
def _values(grid: Grid) -> NDArray[np.float64]:
    codes = np.arange(2**grid.bits)
    if grid.family == "int":
        values = (codes - grid.offset).astype(np.float64)
    elif grid.family == "codebook":
        values = np.array(grid.codebook, dtype=np.float64)
    elif grid.family == "exponent":
        values = np.where(codes == 2**grid.bits - 1, np.nan, np.exp2(codes.astype(np.float64) - grid.bias))
    else:
        values = _float_values(grid, codes)
    return values


def _float_values(grid: Grid, codes: NDArray[np.int64]) -> NDArray[np.float64]:
    magnitude = codes & (2 ** (grid.exponent + grid.mantissa) - 1)
    exponent = magnitude >> grid.mantissa
    fraction = (magnitude & (2**grid.mantissa - 1)) / 2**grid.mantissa
    normal = exponent > 0
    values: NDArray[np.float64] = np.exp2(np.where(normal, exponent, 1) - float(grid.bias)) * (fraction + normal)
    if grid.specials == "ieee":
        values[exponent == 2**grid.exponent - 1] = np.nan
    elif grid.specials == "fn":
        values[magnitude == 2 ** (grid.exponent + grid.mantissa) - 1] = np.nan
    values[codes >> (grid.exponent + grid.mantissa) == 1] *= -1
    return values


def int_grid(bits: int, signed: bool = True) -> Grid:
    """Integers of `bits` bits, two's complement range when signed.

    >>> int_grid(2).values().tolist()
    [-2.0, -1.0, 0.0, 1.0]
    """
    return Grid(f"{'' if signed else 'u'}int{bits}", bits, "int", signed)


def float_grid(exponent: int, mantissa: int, signed: bool = True) -> Grid:
    """A small float by its field widths, with the special values of its standard.

    e5m2, ue5m3 and the 16-bit floats follow IEEE 754, e4m3 is "fn" (OFP8); floats of other widths have no special
    values (as in MX).

    >>> float_grid(2, 1).values()[:8].tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    bits = signed + exponent + mantissa
    specials = "none"
    if (exponent, mantissa) == (4, 3) and signed:
        specials = "fn"
    elif bits >= 16 or (exponent == 5 and bits == 8):
        specials = "ieee"
    bias = 2 ** (exponent - 1) - 1
    return Grid(
        f"{'' if signed else 'u'}e{exponent}m{mantissa}", bits, "float", signed, exponent, mantissa, bias, specials
    )


E8M0 = Grid("e8m0", 8, "exponent", signed=False, exponent=8, bias=127)


def codebook(name: str, levels: Sequence[float]) -> Grid:
    """A grid of these levels, in ascending order, a power of two of them."""
    return Grid(name, (len(levels) - 1).bit_length(), "codebook", codebook=tuple(map(float, levels)))


NORMAL_FLOAT_4 = codebook("nf4", NF4)
CODEBOOKS = {
    grid.name: grid
    for grid in (
        NORMAL_FLOAT_4,
        codebook("iq4nl", IQ4_NL),
        *(codebook(f"nl{bits}", levels) for bits, levels in enumerate(NON_LINEAR, 2)),
    )
}
FLOAT_COPIES = {
    "fp32": Grid("fp32", 32, "float", True, 8, 23, 127, "ieee"),
    "fp16": Grid("fp16", 16, "float", True, 5, 10, 15, "ieee"),
    "bf16": Grid("bf16", 16, "float", True, 8, 7, 127, "ieee"),
}
# Integer types of the scales and minima in super-blocks.
INTEGER_SCALES = {grid.name: grid for grid in (int_grid(4, False), int_grid(6, False), int_grid(6), int_grid(8))}
# The number formats that a scale can be stored in.
SCALES: dict[str, Grid] = {
    **FLOAT_COPIES,
    "e8m0": E8M0,
    "e4m3": float_grid(4, 3),
    "ue5m3": float_grid(5, 3, signed=False),
    **INTEGER_SCALES,
}
