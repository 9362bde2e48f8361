import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.grids import NORMAL_FLOAT_4, float_grid, int_grid
from mpq.network.calibration import seeded
from mpq.rounding.stochastic import stochastic_round

GRIDS = [float_grid(2, 1), float_grid(4, 3), float_grid(5, 3, signed=False), int_grid(4), NORMAL_FLOAT_4]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_the_mean_of_many_draws_is_the_number(grid):
    draws = 100_000
    span = min(grid.max, 6.0)
    for number in (0.13 * span, 0.31 * span, 0.77 * span, max(grid.min, -0.6 * span)):
        rounded = stochastic_round(torch.full((draws,), number), grid, seeded(0, grid.name, number)).double()
        values = rounded.unique()
        assert len(values) <= 2
        error = rounded.std().item() / draws**0.5
        assert abs(rounded.mean().item() - number) <= 4 * error + 1e-6 * span


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_grid_values_stay_and_others_round_to_a_neighbour(grid):
    values = torch.tensor(sorted(set(grid.values()[~torch.tensor(grid.values()).isnan().numpy()])), dtype=torch.float32)
    assert torch.equal(stochastic_round(values, grid, seeded(1)), values)
    beyond = torch.tensor([2 * grid.max + 1, -grid.max - abs(grid.min) - 1])
    assert stochastic_round(beyond, grid, seeded(1)).tolist() == [pytest.approx(grid.max), pytest.approx(grid.min)]
    between = (values[1:] + values[:-1]) / 2
    rounded = stochastic_round(between, grid, seeded(2))
    assert bool(((rounded == values[1:]) | (rounded == values[:-1])).all())


def test_few_random_bits_round_up_with_quantized_probability():
    numbers = torch.full((200_000,), 0.5 + 0.5 * 5 / 16)  # five sixteenths of the way from 0.5 to 1
    rounded = stochastic_round(numbers, float_grid(2, 1), seeded(3), random_bits=4)
    up = (rounded == 1).double().mean().item()
    assert abs(up - 5 / 16) < 4 * (5 / 16 * 11 / 16 / 200_000) ** 0.5


def test_the_seed_decides():
    numbers = torch.linspace(-6, 6, 999)
    first, again, other = (stochastic_round(numbers, float_grid(2, 1), seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for grid in (float_grid(8, 7), int_grid(9)):
        with pytest.raises(MpqError, match="up to 8 bits"):
            stochastic_round(numbers, grid, seeded(4))
