import math

import pytest
import torch

from mpq.core.errors import MpqError
from mpq.lowprecision.masking import Mask, masked

PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # every bfloat16
NUMBERS = PATTERNS[PATTERNS.isfinite()].double()


def steps(kept):
    """Distance of neighbouring numbers with `kept` mantissa bits around each number."""
    exponent = (torch.frexp(NUMBERS.abs()).exponent - 1).clamp(min=-126)
    return torch.ldexp(torch.ones_like(NUMBERS), exponent - kept)


def same(ours, expected):
    return torch.equal(ours.double(), expected) and torch.equal(ours.signbit(), expected.signbit())


@pytest.mark.parametrize("kept", range(8))
def test_every_number_is_cut_off_towards_zero(kept):
    ours = masked(NUMBERS.bfloat16(), Mask(kept))
    expected = torch.trunc(NUMBERS / steps(kept)) * steps(kept)
    assert same(ours, expected)
    assert torch.equal(masked(ours, Mask(kept)), ours)
    normal = NUMBERS.abs() >= 2.0**-126
    assert ((ours.double() - NUMBERS).abs()[normal] < 2.0**-kept * NUMBERS.abs()[normal]).all()


@pytest.mark.parametrize("kept", range(1, 8))  # without a mantissa the even code is the even exponent
def test_every_number_is_rounded_to_nearest_even(kept):
    ours = masked(NUMBERS.bfloat16(), Mask(kept, rounding="nearest"))
    expected = torch.round(NUMBERS / steps(kept)) * steps(kept)
    beyond = expected.abs() >= 2.0**128
    assert torch.equal(ours.double()[beyond], expected[beyond].sign() * math.inf)
    assert same(ours[~beyond], expected[~beyond])


def test_cutting_is_biased_and_rounding_is_not():
    between = PATTERNS[(PATTERNS >= 1) & (PATTERNS < 2)].double()
    errors = {r: (masked(between.bfloat16(), Mask(3, rounding=r)).double() - between).mean().item() for r in
              ("truncate", "nearest")}  # fmt: skip
    assert errors["truncate"] == pytest.approx(-(0.125 - 2**-7) / 2)
    assert errors["nearest"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rounding", ["truncate", "nearest"])
def test_infinities_and_nans_stay(rounding):
    specials = PATTERNS[~PATTERNS.isfinite()]
    for kept in range(8):
        ours = masked(specials, Mask(kept, rounding=rounding))
        assert torch.equal(ours.isnan(), specials.isnan())
        assert torch.equal(ours[ours.isinf()], specials[specials.isinf()])


@pytest.mark.parametrize("exponent", [2, 4, 5, 7])
def test_every_number_outside_the_range_is_clipped(exponent):
    mask = Mask(exponent=exponent)
    top, bottom = 2 ** (exponent - 1) - 1, 2 - 2 ** (exponent - 1)
    largest = (2 - 2**-7) * 2.0**top
    assert (mask.largest, mask.smallest_normal) == (largest, 2.0**bottom)
    expected = torch.where(NUMBERS.abs() < 2.0**bottom, 0.0, NUMBERS).clamp(-largest, largest)
    assert torch.equal(masked(NUMBERS.bfloat16(), mask).double(), expected)
    outer = masked(NUMBERS.bfloat16(), Mask(exponent=exponent, inner=False)).double()
    assert torch.equal(outer, NUMBERS.clamp(-largest, largest))
    inner = masked(NUMBERS.bfloat16(), Mask(exponent=exponent, outer=False)).double()
    assert torch.equal(inner, torch.where(NUMBERS.abs() < 2.0**bottom, 0.0, NUMBERS))


def test_the_largest_of_seven_exponent_bits():
    assert Mask(exponent=7).largest == pytest.approx(2.0**64, rel=2**-7)


def test_other_types_are_rounded_to_bfloat16_first():
    values = torch.tensor([1.0 + 2**-8 + 2**-12, 3.1])
    assert masked(values, Mask()).tolist() == values.bfloat16().tolist()
    assert masked(values.double(), Mask(1)).tolist() == [1.0, 3.0]


def test_invalid_masks_are_refused():
    for settings in ({"mantissa": 8}, {"exponent": 1}, {"rounding": "up"}):
        with pytest.raises(MpqError):
            Mask(**settings)
