from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, make_problem

from mpq.core.errors import MpqError
from mpq.search.exact import exact
from mpq.search.integer import integer


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_the_optimum_under_two_budgets_is_that_of_enumeration(seed, layers, size_share, bitops_share):
    problem = make_problem(seed, layers)
    budgets = {name: between(problem, name, share) for name, share in (("size", size_share), ("bitops", bitops_share))}
    problem = replace(problem, budgets=budgets)
    _, losses = brute_force(problem)
    if not len(losses):
        with pytest.raises(MpqError, match="cannot be met together"):
            integer(problem)
        return
    found = integer(problem)
    assert found.losses[0] == pytest.approx(losses[-1], rel=1e-6)
    totals = problem.totals(found.choices[0])
    assert all(totals[name] <= budget for name, budget in budgets.items())


def between(problem, name, share):
    cost = np.where(np.isfinite(problem.losses), problem.costs[name], np.nan)
    low, high = np.nanmin(cost, 1).sum(), np.nanmax(cost, 1).sum()
    return low + share * (high - low)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_it_agrees_with_the_exact_frontier(seed, share):
    problem = make_problem(seed, layers=12)
    frontier = exact(problem)
    budget = between(problem, "size", share)
    found = integer(replace(problem, budgets={"size": budget}))
    assert found.losses[0] == pytest.approx(frontier.losses[frontier.index_at(cost=budget)], rel=1e-6)


def test_a_budget_out_of_reach_is_named():
    problem = replace(make_problem(1), budgets={"size": 1.0})
    with pytest.raises(MpqError, match="budget of 1 size is below the smallest"):
        integer(problem)
    with pytest.raises(MpqError, match="at least one budget"):
        integer(make_problem(1))
