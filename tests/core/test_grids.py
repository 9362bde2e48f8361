"""Grids, value for value, against torch's own dtypes and the tables of the standards."""

import numpy as np
import pytest
import torch

from experiments.benchmarks import bench_codebooks
from mpq.core.formats import parse_format
from mpq.core.grids import E8M0, FLOAT_COPIES, NON_LINEAR, NORMAL_FLOAT_4, SCALES, float_grid, int_grid
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
