"""Derivatives that stand in for that of rounding, which is zero almost everywhere (arXiv 2509.17791, section 3).

Between two neighbours of the grid, at the fraction u of the step, each relaxation rises from the lower to the upper
one: "straight-through" as the line itself, "power" as 1/2 (1 + sign(2u - 1) |2u - 1|^(1/k)) with its derivative clipped
to 3 (arXiv 2501.17116, where k = 5), "spline" as 3 u^2 - 2 u^3, "sigmoid" as 1 / (1 + exp(-k (u - 1/2))), normalized to
reach both ends.
"""

import math

import torch
from torch import Tensor

from mpq.core.grids import Grid
from mpq.rounding.stochastic import ascending

RELAXATIONS = ("straight-through", "power", "spline", "sigmoid")
CLIPPED = 3.0  # largest derivative of "power", which is infinite in the middle
EDGE = 1e-4  # steps beyond the grid's ends that division may put the largest element of a group


def rounding_slope(values: Tensor, grid: Grid, relaxation: str, steepness: float = 5.0) -> Tensor:
    """Derivative of the relaxed rounding at each value, float32 of the same shape.

    Values are in units of the scale. Beyond the grid's ends it is zero, except that straight-through gradients pass.
    """
    if relaxation == "straight-through":
        return torch.ones_like(values, dtype=torch.float32)
    table = ascending(grid).to(values.device)
    numbers = values.float().contiguous()
    upper = torch.searchsorted(table, numbers).clamp(1, len(table) - 1)
    fraction = (numbers - table[upper - 1]) / (table[upper] - table[upper - 1])
    inside = (fraction >= -EDGE) & (fraction <= 1 + EDGE)
    return torch.where(inside, _slope(fraction.clamp(0, 1), relaxation, steepness), torch.zeros_like(fraction))


def _slope(fraction: Tensor, relaxation: str, steepness: float) -> Tensor:
    if relaxation == "spline":
        return 6 * fraction * (1 - fraction)
    if relaxation == "power":
        return ((2 * fraction - 1).abs() ** (1 / steepness - 1) / steepness).clamp(max=CLIPPED)
    chance = torch.sigmoid(steepness * (fraction - 0.5))
    return steepness * chance * (1 - chance) / math.tanh(steepness / 4)
