"""Stochastic rounding: up or down with probabilities that keep the mean."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.grids import Grid


def stochastic_round(values: Tensor, grid: Grid, generator: torch.Generator, random_bits: int | None = None) -> Tensor:
    """One of the two grid values around each value, float32 of the same shape; its mean is the value itself.

    A value at fraction `d` of the step to its upper neighbour is rounded up when d + r >= 1, r uniform in (0, 1).
    Values beyond the grid's ends are clipped, which is the only bias.

    Args:
        values: in units of the scale, on the generator's device.
        grid: of up to 8 bits.
        generator: the source of r.
        random_bits: draw r from the centres of 2**random_bits equal intervals, as hardware does; the bias is then at
            most 2**-(random_bits + 1) steps.

    Raises:
        MpqError: a grid of more than 8 bits.
    """
    if grid.bits > 8:
        raise MpqError(f"invalid grid for stochastic rounding: expected up to 8 bits, not {grid.name}")
    table = ascending(grid).to(values.device)
    numbers = values.float().clamp(grid.min, grid.max).contiguous()
    upper = torch.searchsorted(table, numbers, right=True).clamp(1, len(table) - 1)
    low, high = table[upper - 1], table[upper]
    fraction = (numbers - low) / (high - low)
    if random_bits is None:
        draws = 1 - torch.rand(numbers.shape, generator=generator, device=values.device, dtype=torch.float32)
    else:
        parts = torch.randint(0, 2**random_bits, numbers.shape, generator=generator, device=values.device)
        draws = (2 * parts + 1) / 2 ** (random_bits + 1)
    # A draw of exactly 1 must not round up a value that lies on the grid.
    return torch.where((fraction + draws >= 1) & (fraction > 0), high, low)


@lru_cache(maxsize=32)
def ascending(grid: Grid) -> Tensor:
    """The grid's finite values in ascending order, float32."""
    values = grid.values()
    return torch.tensor(np.unique(values[np.isfinite(values)]), dtype=torch.float32)
