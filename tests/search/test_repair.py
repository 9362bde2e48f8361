"""The likeliest choices within a budget, against enumeration."""

from itertools import product

import numpy as np
import pytest

from mpq.core.errors import MpqError
from mpq.search.repair import FLOORS, IMPOSSIBLE, likeliest_within, likely_within


def random_case(seed):
    random = np.random.default_rng(seed)
    chances = np.log(random.dirichlet(np.ones(3), 4))
    costs = random.integers(1, 60, (4, 3)).astype(float)
    least, most = costs.min(1).sum(), costs.max(1).sum()
    return chances, costs, float(random.uniform(least, most))


def enumerated(chances, costs, budget, floor):
    """The largest log-probability of choices that cost from `floor` of the budget to the budget; None without any."""
    rows = np.arange(len(costs))
    sums = [
        chances[rows, list(choice)].sum()
        for choice in product(range(costs.shape[1]), repeat=len(costs))
        if floor * budget <= costs[rows, list(choice)].sum() <= budget
    ]
    return max(sums, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_the_likeliest_choices_are_those_of_an_enumeration(seed):
    chances, costs, budget = random_case(seed)
    rows = np.arange(len(costs))
    chosen = likeliest_within(chances, costs, budget)
    cost = costs[rows, chosen].sum()
    best = next((found for floor in FLOORS if (found := enumerated(chances, costs, budget, floor)) is not None), None)
    assert cost <= budget
    if best is None:
        assert chosen.tolist() == costs.argmin(1).tolist()
    else:
        assert chances[rows, chosen].sum() == pytest.approx(best)


def test_a_budget_below_the_cheapest_choice_is_refused():
    chances, costs, _ = random_case(0)
    with pytest.raises(MpqError, match="below the cheapest choice"):
        likeliest_within(chances, costs, costs.min(1).sum() - 0.5)
    exactly = likeliest_within(chances, costs, costs.min(1).sum())
    assert exactly.tolist() == costs.argmin(1).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_switches_stay_within_the_budget_and_use_it(seed):
    chances, costs, budget = random_case(seed)
    rows = np.arange(len(costs))

    def cost(choices):
        return float(costs[rows, choices].sum())

    chosen = likely_within(chances, cost, budget)
    assert cost(chosen) <= budget
    if cost(chosen) < FLOORS[0] * budget:  # then no single switch that costs more fits
        for decision, option in np.ndindex(*costs.shape):
            other = chosen.copy()
            other[decision] = option
            assert not cost(chosen) < cost(other) <= budget


def test_a_switch_loses_the_least_probability_for_what_it_saves():
    chances = np.log(np.array([[0.6, 0.4], [0.9, 0.1]]))
    costs = np.array([[10.0, 8.0], [10.0, 0.0]])  # losses 0.41 for 2 and 2.2 for 10: 0.203 and 0.22 a unit

    def cost(choices):
        return float(costs[[0, 1], choices].sum())

    assert likely_within(chances, cost, 18.5).tolist() == [1, 0]
    assert likely_within(chances, cost, 20.0).tolist() == [0, 0]
    assert likely_within(chances, cost, 10.0).tolist() == [0, 1]  # both switches, and the first one back
    with pytest.raises(MpqError, match="cheapest choice that was found, 8"):
        likely_within(chances, cost, 7.0)


def test_impossible_options_are_never_taken():
    chances = np.array([[0.0, IMPOSSIBLE], [0.0, -1.0]])
    costs = np.array([[10.0, 1.0], [10.0, 5.0]])
    assert likely_within(chances, lambda choices: float(costs[[0, 1], choices].sum()), 15.0).tolist() == [0, 1]
