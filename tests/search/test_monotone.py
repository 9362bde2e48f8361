"""HAWQ-V2's frontier is that of enumerating monotone allocations, and never below the exact one."""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_problem

from mpq.core.errors import MpqError
from mpq.core.frontier import non_dominated
from mpq.search.exact import exact
from mpq.search.monotone import monotone


def enumerated(problem, sensitivities, cost):
    order = np.argsort(-sensitivities, kind="stable")
    levels = np.argsort(problem.costs[cost].sum(0), kind="stable")[::-1]
    choices = np.array(list(combinations_with_replacement(range(len(levels)), len(order))))
    whole = np.empty_like(choices)
    whole[:, order] = levels[choices]
    rows = np.arange(len(order))
    costs, losses = problem.costs[cost][rows, whole].sum(1), problem.losses[rows, whole].sum(1)
    kept = non_dominated(costs, losses)
    return costs[kept], losses[kept]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from(["size", "bitops"]))
def test_it_is_the_frontier_of_enumeration(seed, layers, cost):
    problem = make_problem(seed, layers)
    sensitivities = np.random.default_rng(seed).random(layers)
    costs, losses = enumerated(problem, sensitivities, cost)
    if not len(costs):
        with pytest.raises(MpqError, match="no monotone allocation"):
            monotone(problem, cost=cost, sensitivities=sensitivities)
        return
    found = monotone(problem, cost=cost, sensitivities=sensitivities)
    np.testing.assert_allclose(found.costs, costs, rtol=1e-12)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
    for index, choices in enumerate(found.choices):
        assert problem.totals(choices)[cost] == pytest.approx(found.costs[index])
        assert found.allocation(index).loss == pytest.approx(found.losses[index])
    best = exact(problem, cost=cost)
    # Sums along a frontier: each of at most 10 moves a layer rounds by eps of the largest loss.
    rounding = 10 * layers * np.finfo(float).eps * best.losses.max()
    for total, loss in zip(found.costs, found.losses, strict=True):
        reachable = best.losses[best.costs <= total * (1 + 1e-12)]
        assert reachable.min() <= loss + rounding


def test_fifty_layers_and_budgets():
    problem = make_problem(1, 50)
    whole = monotone(problem)
    middle = float(np.median(whole.costs))
    cut = monotone(replace(problem, budgets={"size": middle}))
    assert cut.costs.tolist() == whole.costs[whole.costs <= middle].tolist()
    with pytest.raises(MpqError, match="below the smallest monotone"):
        monotone(replace(problem, budgets={"size": 1.0}))
    with pytest.raises(MpqError, match="does not support budgets of bitops"):
        monotone(replace(problem, budgets={"bitops": 1.0}))
    with pytest.raises(MpqError, match="each of 50 groups"):
        monotone(problem, sensitivities=[1.0])
    with pytest.raises(MpqError, match="unknown cost 'time'"):
        monotone(problem, cost="time")


@pytest.mark.parametrize("seed", [1, 2, 4, 5, 7, 8])
def test_groups_are_ordered_by_loss_for_each_weight(seed):
    """At the fewest bits that all groups take; those with one sensitivity missing, or too few, are refused."""
    problem = make_problem(seed, layers=5)
    weights = np.array([problem.layers[group[0]].params for group in problem.groups])
    fewest = int(np.argmin(problem.costs["size"].sum(0)))
    expected = monotone(problem, sensitivities=problem.losses[:, fewest] / weights)
    found = monotone(problem)
    assert [choices.tolist() for choices in found.choices] == [choices.tolist() for choices in expected.choices]
    lost = problem.losses.copy()
    lost[0, fewest] = np.inf  # forbidden for one group: the next scheme that all take counts
    possible = next(j for j in np.argsort(problem.costs["size"].sum(0), kind="stable") if j != fewest)
    forbidden = replace(problem, losses=lost)
    expected = monotone(forbidden, sensitivities=lost[:, possible] / weights)
    assert np.array_equal(monotone(forbidden).losses, expected.losses)
    with pytest.raises(MpqError, match="a number for each of 5 groups, without NaN"):
        monotone(problem, sensitivities=[1.0, np.nan, 1.0, 1.0, 1.0])
