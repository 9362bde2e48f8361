import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.lowprecision.recipe import Recipe, divisors, round_operand
from mpq.network.calibration import seeded
from mpq.rounding.reference import fake_quantize

FORMATS = (
    "mxfp4",
    "nvfp4",
    "fp4-e2m1-g16-sue5m3",
    "fp4-e2m1-g16-sue5m3-ts",
    "fp4-e2m1-g16-se4m3",
    "int4-channel",
    "int8",
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 37)])
def test_division_is_what_quantizing_does(name, shape):
    matrix, format = normal(*shape), parse_format(name)
    assert torch.equal(round_operand(matrix, format), fake_quantize(matrix, format))


def test_square_tiles_are_one_number_in_both_directions():
    matrix, format = normal(40, 56), parse_format("nvfp4")
    scales = divisors(matrix, format, square=True)
    assert torch.equal(divisors(matrix.T, format, square=True), scales.T)
    assert torch.equal(round_operand(matrix.T, format, square=True), round_operand(matrix, format, square=True).T)
    assert not torch.equal(round_operand(matrix.T, format), round_operand(matrix, format).T)
    for rows, cols in ((slice(0, 16), slice(16, 32)), (slice(32, 40), slice(48, 56))):
        assert len(scales[rows, cols].unique()) == 1
    assert scales.unique().numel() > 3


@pytest.mark.parametrize("square", [False, True])
def test_stochastic_operands_are_unbiased(square):
    matrix, format, generator = normal(16, 16), parse_format("fp4-e2m1-g16-sfp32"), seeded(1)
    draws = torch.stack([round_operand(matrix, format, square=square, generator=generator) for _ in range(4000)])
    errors = draws.double().std(0) / 4000**0.5
    deviations = (draws.double().mean(0) - matrix.double()).abs() / errors.clamp(min=1e-6)
    assert deviations.max() < 5  # 256 numbers: one beyond five standard errors in 7,000 runs


def flushed(matrix, name, convention):
    """Share of the groups of 16 that hold numbers and become all zeros."""
    rounded = round_operand(matrix, parse_format(name), convention=convention).view(-1, 16)
    return (rounded == 0).all(1).double().mean().item()


def test_small_gradients_survive_division_with_a_tensor_scale_and_not_multiplication():
    """The code of arXiv 2509.17791 multiplies by a rounded reciprocal; small blocks need multipliers beyond E4M3."""
    rows = torch.exp(2 * normal(512, 1, seed=3))
    gradients = 1e-5 * rows * normal(512, 64, seed=4)
    assert flushed(gradients, "nvfp4", "divide") <= 0.001
    assert flushed(gradients, "fp4-e2m1-g16-sue5m3-ts", "divide") <= 0.001
    assert flushed(gradients, "nvfp4", "reciprocal") > 0.05
    assert flushed(gradients, "fp4-e2m1-g16-se4m3", "divide") > 0.5
    assert flushed(gradients, "fp4-e2m1-g16-se4m3", "reciprocal") > 0.5
    assert flushed(gradients, "fp4-e2m1-g16-sue5m3-ts", "reciprocal") < flushed(gradients, "nvfp4", "reciprocal")


@pytest.mark.parametrize("convention", ["divide", "reciprocal"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp4-e2m1-g16-sue5m3-ts"])
def test_normal_numbers_keep_their_signal_in_both_conventions(name, convention):
    matrix = normal(64, 256, seed=5)
    error = round_operand(matrix, parse_format(name), convention=convention) - matrix
    decibels = 10 * torch.log10(matrix.square().mean() / error.square().mean()).item()
    assert 17 < decibels < 22  # about 20.4 dB for blocks of 16 with fine scales, a little less for powers of two


@pytest.mark.parametrize("convention", ["divide", "reciprocal"])
def test_zeros_stay_zeros(convention):
    for name in FORMATS:
        assert torch.equal(
            round_operand(torch.zeros(3, 32), parse_format(name), convention=convention), torch.zeros(3, 32)
        )


def test_unknown_settings():
    for settings in ({"stochastic": "backwards"}, {"hadamard": "some"}, {"convention": "times"}):
        with pytest.raises(MpqError, match="is one of"):
            Recipe("nvfp4", **settings)
    with pytest.raises(MpqError, match="symmetric"):
        Recipe("int4-g128-asym")
    with pytest.raises(MpqError, match="with groups"):
        Recipe("fp8-e4m3", square_weights=True)
