import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.grids import SCALES
from mpq.lowprecision.operands import divisors, from_tiles, round_directed, round_operand, to_tiles
from mpq.lowprecision.products import operands_of, product
from mpq.lowprecision.recipe import BY_INPUTS, BY_WEIGHT, FORWARD, Recipe
from mpq.network.calibration import seeded
from mpq.rounding.codes import round_scales
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
def test_the_division_convention_equals_quantization(name, shape):
    matrix, format = normal(*shape), parse_format(name)
    assert torch.equal(round_operand(matrix, format), fake_quantize(matrix, format))


def test_square_tiles_are_one_number_in_both_directions():
    matrix, format = normal(40, 56), parse_format("nvfp4")

    def expanded(matrix):
        tiles = to_tiles(matrix, format, square=True)
        return from_tiles(divisors(tiles, format).expand_as(tiles), format, tuple(matrix.shape), square=True)

    scales = expanded(matrix)
    assert torch.equal(expanded(matrix.T), scales.T)
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
def test_zeros_stay_zero(convention):
    for name in FORMATS:
        assert torch.equal(
            round_operand(torch.zeros(3, 32), parse_format(name), convention=convention), torch.zeros(3, 32)
        )


def test_unknown_settings_are_refused():
    for settings in ({"stochastic": "backwards"}, {"hadamard": "some"}, {"convention": "times"}):
        with pytest.raises(MpqError, match="is one of"):
            Recipe("nvfp4", **settings)
    with pytest.raises(MpqError, match="symmetric"):
        Recipe("int4-g128-asym")
    with pytest.raises(MpqError, match="with groups"):
        Recipe("fp8-e4m3", square_weights=True)


@pytest.mark.parametrize("kind", ["e8m0", "e4m3", "ue5m3", "fp16", "bf16", "fp32"])
def test_directed_rounding_takes_the_next_number_on_that_side(kind):
    numbers = torch.exp(6 * normal(3000, seed=6)).clamp(2.0**-8, 440)
    up, down = (round_directed(numbers, kind, direction) for direction in (1, -1))
    assert (down <= numbers).all()
    assert (up >= numbers).all()
    for rounded in (up, down):
        assert torch.equal(round_scales(rounded, kind), rounded)
        assert torch.equal(round_directed(rounded, kind, 1), rounded)
    if SCALES[kind].bits <= 16:
        table = torch.tensor(SCALES[kind].values(), dtype=torch.float64)
        table = table[table.isfinite() & (table > 0)].sort().values
        index = torch.searchsorted(table, numbers.double())
        assert torch.equal(up.double(), table[index])
    ends = torch.tensor([0.0, SCALES[kind].smallest / 4, SCALES[kind].max])
    assert round_directed(ends, kind, 1).isfinite().all()
    assert round_directed(ends, kind, -1)[0] == 1
    assert (round_directed(ends, kind, -1) > 0).all()


@pytest.mark.parametrize("convention", ["divide", "reciprocal"])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp4-e2m1-g16-sue5m3-ts", "fp8-e4m3-channel-se8m0"])
def test_scales_rounded_upwards_clip_nothing(name, convention):
    matrix, format = 0.01 * normal(64, 64, seed=7), parse_format(name)

    def clipped(scale_rounding):
        tiles = to_tiles(matrix, format)
        return (tiles / divisors(tiles, format, convention, scale_rounding)).abs().amax() > format.grid.max * (1 + 1e-6)

    assert not clipped("up")
    assert clipped("nearest")


def test_each_operand_has_its_own_format():
    recipe = Recipe("fp8-e4m3", gradients="fp8-e5m2", activations="bf16")
    left, right = normal(8, 32), normal(6, 32, seed=1)
    expected = {FORWARD: ("bf16", "fp8-e4m3"), BY_INPUTS: ("fp8-e5m2", "fp8-e4m3"), BY_WEIGHT: ("fp8-e5m2", "bf16")}
    for roles, formats in expected.items():
        operands = operands_of(left, right, recipe, seeded(0), roles)
        for exact, rounded, name in zip((left, right), operands.rounded, formats, strict=True):
            assert torch.equal(rounded, fake_quantize(exact, parse_format(name)).float())
            assert not torch.equal(rounded, exact)


def test_a_loss_scale_brings_small_gradients_into_range_and_changes_nothing_else():
    left, right = 1e-6 * normal(16, 32), normal(6, 32, seed=1)
    exact = left @ right.T

    def error(scale, roles=BY_INPUTS, name="fp4-e2m1-g16-se4m3"):
        ours = product(left, right, Recipe(name, loss_scale=scale), seeded(0), roles)
        return ((ours - exact).norm() / exact.norm()).item()

    assert error(1.0) > 0.9  # scales below E4M3's smallest number
    assert error(2.0**20) < 0.3
    assert error(2.0**20, FORWARD) == error(1.0, FORWARD)
    assert error(2.0**20, BY_INPUTS, "mxfp4") == pytest.approx(error(1.0, BY_INPUTS, "mxfp4"))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MpqError, match="positive"):
            Recipe("nvfp4", loss_scale=value)
