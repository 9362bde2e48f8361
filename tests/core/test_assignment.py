"""Rows of a mix get the assignment that enumeration finds, at exactly the number of bytes asked for."""

from itertools import product

import numpy as np
import pytest

from mpq.core.assignment import MARGINAL, assign, random_assignment
from mpq.core.mix import parse_mix


def reachable(random: np.random.Generator, sizes: list[int], rows: int) -> int:
    """Bytes of a random mix of two formats of neighbouring sizes."""
    ascending = sorted(sizes)
    low = int(random.integers(len(sizes) - 1))
    return rows * ascending[low] + int(random.integers(rows + 1)) * (ascending[low + 1] - ascending[low])


def cheapest(costs: np.ndarray, sizes: list[int], total: int) -> float:
    """Least cost of an assignment that takes so many bytes, over all totals that the first rows can take."""
    best = {0: 0.0}
    for row in costs:
        longer: dict[int, float] = {}
        for (taken, cost), (own, size) in product(best.items(), zip(row.tolist(), sizes, strict=True)):
            longer[taken + size] = min(longer.get(taken + size, np.inf), cost + own)
        best = longer
    return best[total]


@pytest.mark.parametrize("seed", range(60))
def test_few_rows_get_the_optimal_assignment(seed):
    """As many rows as dynamic programming takes, whatever the order of the formats, with ties and zero costs too."""
    random = np.random.default_rng(seed)
    rows, formats = int(random.integers(1, 33)), int(random.integers(2, 5))
    sizes = random.choice(np.arange(1, 20), formats, replace=False).tolist()
    costs = random.integers(0, 4, (rows, formats)).astype(float) if seed % 2 else random.random((rows, formats))
    total = reachable(random, sizes, rows)
    places = assign(costs, sizes, total)
    assert places.dtype == np.uint8
    assert sum(sizes[place] for place in places) == total
    assert costs[np.arange(rows), places].sum() == pytest.approx(cheapest(costs, sizes, total))


@pytest.mark.parametrize("seed", range(10))
def test_many_rows_are_within_0_1_percent_of_the_optimum(seed):
    random = np.random.default_rng(seed)
    sizes = [52, 36, 68]
    costs = np.sort(random.lognormal(0, 1, (150, 3)), axis=1)[:, [1, 2, 0]]  # more bytes cost less
    total = reachable(random, sizes, len(costs))
    places = assign(costs, sizes, total)
    assert sum(sizes[place] for place in places) == total
    assert costs[np.arange(150), places].sum() <= cheapest(costs, sizes, total) * 1.001


def test_more_tied_rows_than_dynamic_programming_takes():
    """The multiplier raises all equal rows or none: rows that gain more come first, the others fill the bytes."""
    costs = np.array([[0.0, 1.0, 9.0]] * 100 + [[0.0, 2.0, 9.0]] * 10)
    places = assign(costs, [52, 36, 20], 36 * 110 + 16 * (10 + MARGINAL + 20))
    assert (places[100:] == 0).all()
    assert np.bincount(places).tolist() == [10 + MARGINAL + 20, 110 - 10 - MARGINAL - 20]


def test_a_random_assignment_uses_all_formats_and_differs_by_seed():
    mix = parse_mix("int2-g64/int3-g64/int4-g64@3")
    first, again, other = (random_assignment(mix, 64, 256, seed) for seed in (0, 0, 1))
    assert first.assignment == again.assignment != other.assignment
    assert set(first.assigned(64, 256).tolist()) == {0, 1, 2}
    assert first == mix.with_assignment(first.assignment)
    assert random_assignment(mix, 64, 256).assignment == first.assignment
