"""bfloat16 with fewer mantissa or exponent bits, by masking (arXiv 2405.18710)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.core.errors import MpqError

MANTISSA, EXPONENT = 7, 8  # bits of a bfloat16
ROUNDINGS = ("truncate", "nearest")
EXPONENT_BITS, NAN = 0x7F80, 0x7FC0


@dataclass(frozen=True)
class Mask:
    """The values of E{exponent}M{mantissa} within bfloat16, without scaling (section 3.2).

    mantissa: bits kept, 0 to 7. The paper cuts the others off ("truncate"), which pulls every number towards zero;
        "nearest" rounds to the nearest, ties to even.
    exponent: bits kept, 2 to 8. Numbers beyond the largest become the largest (`outer`), those below the smallest
        normal number become zero (`inner`); the paper finds that the outer range is what training misses.
    """

    mantissa: int = MANTISSA
    exponent: int = EXPONENT
    rounding: str = "truncate"
    outer: bool = True
    inner: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.mantissa <= MANTISSA or not 2 <= self.exponent <= EXPONENT:
            raise MpqError(
                f"invalid mask: expected 0 to 7 mantissa and 2 to 8 exponent bits, not {self.mantissa}, {self.exponent}"
            )
        if self.rounding not in ROUNDINGS:
            raise MpqError(f"rounding is one of {', '.join(ROUNDINGS)}, not {self.rounding!r}")

    @property
    def name(self) -> str:
        """Name such as E8M3, with the rounding unless it truncates."""
        return f"E{self.exponent}M{self.mantissa}" + (" nearest" if self.rounding == "nearest" else "")

    @property
    def largest(self) -> float:
        """Largest number of the masked format; the top exponent is kept for infinities, as in IEEE 754."""
        return math.ldexp(2 - 2.0**-self.mantissa, 2 ** (self.exponent - 1) - 1)

    @property
    def smallest_normal(self) -> float:
        """Smallest normal number of the masked format."""
        return math.ldexp(1.0, 2 - 2 ** (self.exponent - 1))


def masked(values: Tensor, mask: Mask) -> Tensor:
    """The values rounded to bfloat16 (nearest) and then masked, in their own type and shape.

    Rounding to nearest may carry beyond the largest value, to infinity; NaN stays NaN.
    """
    bits = mask_mantissa(values.to(torch.bfloat16).contiguous().view(torch.int16), mask.mantissa, mask.rounding)
    numbers = bits.view(torch.bfloat16)
    if mask.exponent < EXPONENT:
        numbers = clip_exponent(numbers, mask)
    return numbers.to(values.dtype)


def mask_mantissa(bits: Tensor, kept: int, rounding: str = "truncate") -> Tensor:
    """Bit patterns of bfloat16 numbers (int16) with only `kept` mantissa bits."""
    dropped = MANTISSA - kept
    if dropped == 0:
        return bits
    pattern = bits.int() & 0xFFFF
    special = (pattern & EXPONENT_BITS) == EXPONENT_BITS
    nan = special & ((pattern & 0x7F) != 0)
    if rounding == "nearest":
        # Half a unit minus the odd bit: ties go to even. A carry into the exponent gives the next value.
        half = (1 << (dropped - 1)) - 1 + ((pattern >> dropped) & 1)
        pattern = torch.where(special, pattern, pattern + half)
    pattern = torch.where(nan, (pattern & 0x8000) | NAN, pattern & (-1 << dropped))
    return pattern.to(torch.int16)


def clip_exponent(numbers: Tensor, mask: Mask) -> Tensor:
    """Clip bfloat16 values to the range of the mask's exponent; infinities are clipped, NaN stays NaN."""
    if mask.outer:
        numbers = numbers.clamp(-mask.largest, mask.largest)
    if mask.inner:
        numbers = torch.where(numbers.abs() < mask.smallest_normal, torch.zeros_like(numbers), numbers)
    return numbers
