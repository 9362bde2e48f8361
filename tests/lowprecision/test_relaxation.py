import pytest
import torch

from mpq.core.formats import parse_format
from mpq.core.grids import float_grid, int_grid
from mpq.lowprecision.operands import divisors, from_tiles, operand_gradient, round_operand, to_tiles
from mpq.lowprecision.products import products
from mpq.lowprecision.recipe import Recipe
from mpq.lowprecision.relaxation import RELAXATIONS, rounding_slope
from mpq.network.calibration import seeded
from mpq.rounding.stochastic import ascending

SMOOTH = [name for name in RELAXATIONS if name != "straight-through"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("relaxation", SMOOTH)
@pytest.mark.parametrize("grid", [float_grid(2, 1), int_grid(3)])
def test_a_relaxation_rises_by_one_step_from_neighbour_to_neighbour(relaxation, grid):
    table = ascending(grid).double()
    fractions = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    points = table[:-1, None] + fractions * table.diff()[:, None]
    slopes = rounding_slope(points, grid, relaxation)
    clipped = (1 / 15) ** 1.25  # around the middle, where the slope of "power" would exceed 3
    rise = 1 - clipped**0.2 + 3 * clipped if relaxation == "power" else 1.0
    assert slopes.mean(1).numpy() == pytest.approx(rise, rel=1e-3)
    assert (slopes[:, 2000] > 1.2).all()
    assert (slopes[:, 0] < 0.5).all()
    outside = torch.tensor([grid.min - 0.5, grid.max + 0.5])
    assert not rounding_slope(outside, grid, relaxation).any()


def test_straight_through_passes_and_steepness_sharpens():
    values, grid = normal(50), float_grid(2, 1)
    assert torch.equal(rounding_slope(values, grid, "straight-through"), torch.ones(50))
    middle = torch.tensor([0.25])
    for relaxation in ("power", "sigmoid"):
        soft, hard = (rounding_slope(torch.tensor([0.3]), grid, relaxation, k).item() for k in (3.0, 30.0))
        assert soft != hard
    assert rounding_slope(middle, grid, "sigmoid", 20.0) > rounding_slope(middle, grid, "sigmoid", 5.0)


def by_autograd(matrix, upstream, format, recipe, square):
    """The rounded values with the gradients of smooth functions, whose values are subtracted again."""
    matrix = matrix.clone().requires_grad_()
    tiles = to_tiles(matrix, format, square)
    exact = divisors(tiles, format, recipe.convention, recipe.scale_rounding)
    if recipe.scale_gradient == "none":
        scales = exact
    else:
        sizes = tiles.abs()
        smooth = sizes.amax(-1, keepdim=True)
        if recipe.scale_gradient == "softmax":
            smooth = ((sizes / exact).detach().softmax(-1) * sizes).sum(-1, keepdim=True)
        smooth = smooth / format.grid.max
        scales = exact + smooth - smooth.detach()
    elements = tiles / scales
    table = ascending(format.grid)
    rounded = table[(elements.detach().unsqueeze(-1) - table).abs().argmin(-1)]
    soft = elements * rounding_slope(elements, format.grid, recipe.relaxation).detach()
    values = (rounded + soft - soft.detach()) * scales
    from_tiles(values, format, tuple(matrix.shape), square).backward(upstream)
    return matrix.grad


@pytest.mark.parametrize("scale_gradient", ["none", "absmax", "softmax"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("square", [False, True])
def test_gradients_of_rounding_and_of_scales_are_those_of_the_formula(relaxation, scale_gradient, square):
    format = parse_format("fp4-e2m1-g16-sfp32")
    recipe = Recipe(format.name, relaxation=relaxation, scale_gradient=scale_gradient)
    matrix, upstream = normal(18, 40), normal(18, 40, seed=1)
    rounded = round_operand(matrix, format, square=square)
    ours = operand_gradient(matrix, rounded, upstream, format, recipe, square)
    torch.testing.assert_close(ours, by_autograd(matrix, upstream, format, recipe, square), rtol=1e-3, atol=1e-4)
    assert torch.equal(ours, upstream) == recipe.plain_gradient


@pytest.mark.parametrize("hadamard", ["none", "forward"])
def test_relaxations_reach_both_operands_and_leave_the_outputs(hadamard):
    """The released code of arXiv 2509.17791 masks its relaxations where they differ from straight-through."""

    def run(relaxation):
        recipe = Recipe("fp4-e2m1-g16-sfp32", gradients="fp32", hadamard=hadamard, relaxation=relaxation)
        inputs, weight = normal(6, 40).requires_grad_(), normal(5, 40, seed=1).requires_grad_()
        outputs = products(inputs, weight, recipe, seeded(3))
        outputs.backward(normal(6, 5, seed=2))
        return outputs.detach(), inputs.grad, weight.grad

    straight = run("straight-through")
    for relaxation in SMOOTH:
        outputs, *gradients = run(relaxation)
        assert torch.equal(outputs, straight[0])
        for ours, plain in zip(gradients, straight[1:], strict=True):
            cosine = torch.nn.functional.cosine_similarity(ours.flatten(), plain.flatten(), dim=0)
            assert 0.6 < cosine < 0.999
