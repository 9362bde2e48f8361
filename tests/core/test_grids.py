"""Grids, value for value, against torch's own dtypes and the tables of the standards."""

import zlib

import numpy as np
import pytest
import torch
from gguf.quants import IQ4_NL

from experiments.benchmarks import bench_codebooks
from mpq.core.formats import parse_format
from mpq.core.grids import (
    CODEBOOKS,
    E8M0,
    FLOAT_COPIES,
    INTEGER_SCALES,
    NON_LINEAR,
    NORMAL_FLOAT_4,
    SCALES,
    float_grid,
    int_grid,
)
from mpq.network.calibration import seeded

TORCH_FLOATS = [
    (float_grid(4, 3), torch.float8_e4m3fn),
    (float_grid(5, 2), torch.float8_e5m2),
    (E8M0, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize(("grid", "dtype"), TORCH_FLOATS, ids=lambda value: getattr(value, "name", ""))
def test_every_code_of_an_8_bit_float_is_torchs(grid, dtype):
    ours = torch.tensor(grid.values())
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(ours), finite)
    assert torch.equal(ours[finite], theirs[finite])


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_every_code_of_a_16_bit_float_is_torchs(name, dtype):
    ours = torch.tensor(FLOAT_COPIES[name].values())
    theirs = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).double()
    finite = torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(ours), finite)
    assert torch.equal(ours[finite], theirs[finite])


def test_microscaling_elements_are_those_of_the_specification():
    """OCP Microscaling Formats 1.0: all values of E2M1, and the table of section 5.3 for E3M2 and E2M3."""
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float_grid(2, 1).values().tolist() == positive + [-value for value in positive]
    e3m2, e2m3 = float_grid(3, 2), float_grid(2, 3)
    assert (e3m2.max, e3m2.smallest, e3m2.values()[0b000100]) == (28.0, 0.0625, 0.25)  # max, min subnormal, min normal
    assert (e2m3.max, e2m3.smallest, e2m3.values()[0b001000]) == (7.5, 0.125, 1.0)
    assert e3m2.values()[:32].tolist() == sorted(e3m2.values()[:32])
    assert all(np.isfinite(grid.values()).all() for grid in (e3m2, e2m3))


def test_scale_grids_have_the_published_ranges():
    """E8M0: MX section 5.4. E4M3: OFP8 table 1. UE5M3: arXiv 2509.17791 and its follow-up, max 61440, min 2**-17."""
    assert (E8M0.smallest, E8M0.max) == (2.0**-127, 2.0**127)
    assert (SCALES["e4m3"].smallest, SCALES["e4m3"].max) == (2.0**-9, 448.0)
    assert (SCALES["ue5m3"].smallest, SCALES["ue5m3"].max) == (2.0**-17, 61440.0)
    assert SCALES["ue5m3"].values()[8] == 2.0**-14


def test_nf4_contains_zero_and_both_ends():
    """QLoRA, appendix E: 16 ascending values, 8 negative-side steps and 9 positive-side steps sharing zero."""
    values = NORMAL_FLOAT_4.values()
    assert (np.diff(values) > 0).all()
    assert (values[0], values[7], values[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", range(2, 6))
def test_non_linear_levels_are_a_fixed_point_of_lloyds_algorithm(bits):
    """Of 4,096 fresh groups: the mean of the numbers at each level is the level, but for the rounding to integers."""
    levels = NON_LINEAR[bits - 2]
    again = bench_codebooks.improved(levels, bench_codebooks.numbers(2**12, bench_codebooks.FREEDOM, seed=bits))
    assert again == pytest.approx(levels, abs=1.5)


def test_non_linear_levels_are_fixed():
    """Exported codes are indices into them."""
    sums = [zlib.crc32(" ".join(map(str, levels)).encode()) for levels in NON_LINEAR]
    assert sums == [1616064958, 3820058073, 2680891071, 1681911087]


@pytest.mark.parametrize("bits", range(2, 6))
def test_non_linear_levels_have_less_error_than_integers_on_normal_numbers(bits):
    matrix = torch.randn(16, 4096, generator=seeded(bits))
    errors = [bench_codebooks.error(matrix, parse_format(f"{grid}{bits}-g64")) for grid in ("nl", "int")]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_offset_binary(bits):
    assert int_grid(bits).values().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert int_grid(bits, signed=False).values().tolist() == list(range(2**bits))
    assert int_grid(bits).values()[int_grid(bits).offset] == 0


# Bits, sign, bits of exponent and mantissa, bias, specials; least, largest, smallest positive value; a zero, its code.
ATTRIBUTES = {
    "fp32": (32, True, 8, 23, 127, "ieee", -(2 - 2**-23) * 2.0**127, (2 - 2**-23) * 2.0**127, 2.0**-149, True, 0),
    "fp16": (16, True, 5, 10, 15, "ieee", -65504, 65504, 2**-24, True, 0),
    "bf16": (16, True, 8, 7, 127, "ieee", -(2 - 2**-7) * 2.0**127, (2 - 2**-7) * 2.0**127, 2.0**-133, True, 0),
    "e4m3": (8, True, 4, 3, 7, "fn", -448, 448, 2**-9, True, 0),
    "ue5m3": (8, False, 5, 3, 15, "ieee", 0, 61440, 2**-17, True, 0),
    "e8m0": (8, False, 8, 0, 127, "none", 2.0**-127, 2.0**127, 2.0**-127, False, 0),
    "e5m2": (8, True, 5, 2, 15, "ieee", -57344, 57344, 2**-16, True, 0),
    "e5m10": (16, True, 5, 10, 15, "ieee", -65504, 65504, 2**-24, True, 0),
    "e2m1": (4, True, 2, 1, 1, "none", -6, 6, 0.5, True, 0),
    "e6m1": (8, True, 6, 1, 31, "none", -1.5 * 2**32, 1.5 * 2**32, 2**-31, True, 0),
    "e5m3": (9, True, 5, 3, 15, "none", -1.875 * 2**16, 1.875 * 2**16, 2**-17, True, 0),
    "ue4m3": (7, False, 4, 3, 7, "none", 0, 480, 2**-9, True, 0),
    "int6": (6, True, 0, 0, 0, "none", -32, 31, 1, True, 32),
    "uint4": (4, False, 0, 0, 0, "none", 0, 15, 1, True, 0),
    "nf4": (4, True, 0, 0, 0, "none", -1, 1, 0.07958029955625534, True, 0),
    "iq4nl": (4, True, 0, 0, 0, "none", -127, 113, 1, False, 0),
    "nl2": (2, True, 0, 0, 0, "none", -91, 127, 42, False, 0),
}  # fmt: skip
MORE = (float_grid(5, 2), float_grid(5, 10), float_grid(2, 1), float_grid(6, 1), float_grid(5, 3))
KNOWN = {**CODEBOOKS, **{grid.name: grid for grid in (*MORE, float_grid(4, 3, signed=False))}, **SCALES}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_grids(name):
    grid = KNOWN.get(name) or int_grid(int(name[-1]), signed=name[0] != "u")
    fields = (grid.bits, grid.signed, grid.exponent, grid.mantissa, grid.bias, grid.specials)
    assert (grid.name, *fields, grid.min, grid.max, grid.smallest, grid.has_zero, grid.offset) == (
        name, *ATTRIBUTES[name],
    )  # fmt: skip
    assert 2.0**grid.max_exponent <= grid.max < 2.0 ** (grid.max_exponent + 1)


def test_codebooks_match_gguf():
    assert CODEBOOKS["iq4nl"].values().tolist() == list(IQ4_NL.kvalues)
    assert {name: grid.bits for name, grid in CODEBOOKS.items()} == {
        "nf4": 4, "iq4nl": 4, "nl2": 2, "nl3": 3, "nl4": 4, "nl5": 5,
    }  # fmt: skip
    assert list(INTEGER_SCALES) == ["uint4", "uint6", "int6", "int8"]
    assert all((np.diff(grid.values()) > 0).all() for grid in CODEBOOKS.values())
