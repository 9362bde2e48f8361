"""Surfaces and cheapest allocations against enumeration; conflicting constraints are named."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import every_choice, make_problem

from mpq.core.errors import MpqError
from mpq.search.integer import conflicting, integer
from mpq.search.surface import cheapest, surface


def enumerated(problem):
    choices = every_choice(problem)
    rows = np.arange(len(problem.groups))
    costs = np.array([problem.costs[name][rows, choices].sum(1) for name in ("size", "bitops")]).T
    return costs, problem.losses[rows, choices].sum(1)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_every_point_is_optimal_within_its_costs(seed):
    problem = make_problem(seed, 5)
    found = surface(problem, steps=5)
    costs, losses = enumerated(problem)
    for point in range(len(found)):
        within = (costs <= found.costs[point] * (1 + 1e-9)).all(1)
        assert found.losses[point] == pytest.approx(losses[within].min(), rel=1e-6)
        totals = problem.totals(found.choices[point])
        assert found.costs[point].tolist() == [totals["size"], totals["bitops"]]
    objectives = np.column_stack([found.costs, found.losses])
    for one in range(len(found)):
        assert not any((objectives[other] <= objectives[one]).all() for other in range(len(found)) if other != one)
    best = costs[losses == losses.min()].min(0)
    for budgets in product(*(np.linspace(low, high, 5) for low, high in zip(costs.min(0), best, strict=True))):
        within, reached = ((one <= np.array(budgets) * (1 + 1e-9)).all(1) for one in (costs, found.costs))
        if within.any():
            assert found.losses[reached].min() == pytest.approx(losses[within].min(), rel=1e-6)
    assert found.losses.min() == pytest.approx(losses.min(), rel=1e-9)  # both ends of the grid are there
    assert found.costs[:, 0].min() == pytest.approx(costs[:, 0].min())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["size", "bitops"]))
def test_the_cheapest_of_a_quality_is_that_of_enumeration(seed, share, cost):
    problem = make_problem(seed, 5)
    costs, losses = enumerated(problem)
    wanted = float(np.quantile(losses, share))
    # The solver keeps a bound to one part in a million and reports a loss closer to it than that.
    assume(not np.any((losses > wanted) & (losses <= wanted * (1 + 1e-5))))
    found = cheapest(problem, loss=wanted, cost=cost)
    best = costs[losses <= wanted * (1 + 1e-12), ["size", "bitops"].index(cost)].min()
    assert found.costs[0] == pytest.approx(best, rel=1e-9)
    assert found.losses[0] <= wanted * (1 + 1e-9)
    as_cheap = costs[:, ["size", "bitops"].index(cost)] <= best * (1 + 1e-9)
    assert found.losses[0] == pytest.approx(losses[as_cheap].min(), rel=1e-6)


def test_constraints_that_conflict_are_named():
    problem = make_problem(1, 6)
    costs, losses = enumerated(problem)
    latency = problem.costs["size"].max() - problem.costs["size"]  # small where size is large
    problem = replace(problem, costs={**problem.costs, "latency": latency})
    budgets = {
        "size": float(costs[:, 0].min() * 1.01), "bitops": float(costs[:, 1].max()),
        "latency": float(latency.min(1).sum() * 1.01 + 1),
    }  # fmt: skip
    impossible = replace(problem, budgets=budgets)
    assert conflicting(impossible) == ("size", "latency")
    with pytest.raises(MpqError, match="the budgets of size and latency cannot be met together"):
        integer(impossible)
    with pytest.raises(MpqError, match="size and loss cannot be met together"):
        cheapest(replace(problem, budgets={"size": budgets["size"], "bitops": 1e12}), loss=float(losses.min() * 1.001))


def test_errors_of_unreachable_losses_name_the_range():
    problem = make_problem(1, 6)
    costs, losses = enumerated(problem)
    worst = losses[costs[:, 0] == costs[:, 0].min()].min()
    for loss in (float(losses.min()) / 2, float("nan")):
        with pytest.raises(MpqError, match=re.escape(f"{losses.min():.6g} to {worst:.6g} can be reached")):
            cheapest(problem, loss=loss)
    assert cheapest(problem, loss=2 * float(worst)).costs[0] == costs[:, 0].min()


def test_invalid_arguments_are_refused():
    with pytest.raises(MpqError, match="unknown cost 'time'"):
        surface(make_problem(1), ("size", "time"))
    with pytest.raises(MpqError, match="two different costs"):
        surface(make_problem(1), ("size", "size"))
    with pytest.raises(MpqError, match="unknown cost 'time'"):
        cheapest(make_problem(1), loss=1.0, cost="time")
    with pytest.raises(MpqError, match="below the smallest"):
        surface(replace(make_problem(1), budgets={"bitops": 1.0}))


def test_a_surface_has_eight_steps_and_at_least_two():
    problem = make_problem(2, 4)
    assert surface(problem).losses.tolist() == surface(problem, steps=8).losses.tolist()
    assert len(surface(problem, steps=2)) >= 2
    with pytest.raises(MpqError, match="at least two steps, not size, bitops, 1"):
        surface(problem, steps=1)


def test_equal_allocations_are_one_point():
    """Two layers alike: either may take the wider format."""
    problem = make_problem(2, 4)

    def alike(array):
        return np.concatenate([array[:1], array[:1], array[2:]])

    costs = {name: alike(cost) for name, cost in problem.costs.items()}
    found = surface(replace(problem, losses=alike(problem.losses), costs=costs), steps=6)
    assert len({(*point, loss) for point, loss in zip(found.costs.tolist(), found.losses, strict=True)}) == len(found)
