from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, make_problem, make_table

from experiments.benchmarks.random_problems import BUDGETS, LOSSES, made, verdict
from mpq.core.costs import kv_bytes_per_token
from mpq.core.errors import MpqError
from mpq.core.problem import build_problem
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


@pytest.mark.parametrize("losses", [0.0, 0.25, 1e-310, 1e300, -1.0])
@pytest.mark.parametrize("limit", [0.0, 1.0, 1e300])
def test_equal_tiny_and_huge_losses_and_zero_costs(losses, limit):
    problem = make_problem(3, layers=3)
    free = np.where(np.isfinite(problem.losses), 0.0, np.inf)
    bend = np.linspace(1.0, 1.5, problem.losses.size).reshape(problem.losses.shape) if abs(losses) > 1 else 1.0
    none = {"bitops": np.zeros_like(problem.costs["bitops"])}
    budgets = {"size": between(problem, "size", 0.5), "bitops": limit}
    problem = replace(problem, losses=free + losses * bend, costs={**problem.costs, **none}, budgets=budgets)
    _, optima = brute_force(problem)
    assert integer(problem).losses[0] == pytest.approx(optima[-1], rel=1e-6, abs=0)


@pytest.mark.parametrize("names", BUDGETS, ids=len)
@pytest.mark.parametrize("kind", LOSSES)
def test_random_problems_of_every_kind(kind, names):
    assert {verdict(made(seed, kind, names)) for seed in range(10)} == {"agrees"}


def between(problem, name, share):
    cost = np.where(np.isfinite(problem.losses), problem.costs[name], np.nan)
    low, high = np.nanmin(cost, 1).sum(), np.nanmax(cost, 1).sum()
    return low + share * (high - low)


def test_the_solver_prints_nothing(capfd):
    problem = make_problem(7, layers=12)
    integer(replace(problem, budgets={name: between(problem, name, 0.5) for name in ("size", "bitops")}))
    assert capfd.readouterr().out == ""


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_it_agrees_with_the_exact_frontier(seed, share):
    problem = make_problem(seed, layers=12)
    frontier = exact(problem)
    budget = between(problem, "size", share)
    found = integer(replace(problem, budgets={"size": budget}))
    assert found.losses[0] == pytest.approx(frontier.losses[frontier.index_at(cost=budget)], rel=1e-6)


def test_bytes_of_keys_and_values_per_token_are_a_budget_like_any_other():
    table = make_table(2, 5)
    bits = [16 if scheme in ("bf16", "fp8-e4m3") else 4 for scheme in table.schemes]
    kv = np.array([[float(kv_bytes_per_token(1, 4, 64, width)) for width in bits] for _ in table.layers])
    kv[2:] = 0  # only the first two layers have a cache
    budget = float(kv[0].min() + kv[1].max())
    free = build_problem(table, costs={"kv": kv})
    problem = replace(free, budgets={"size": float(free.costs["size"].max(1).sum()), "kv": budget})
    _, losses = brute_force(problem)
    found = integer(problem)
    assert found.losses[0] == pytest.approx(losses[-1], rel=1e-6)
    assert problem.totals(found.choices[0])["kv"] <= budget
    without = integer(replace(problem, budgets={"size": problem.budgets["size"]}))
    assert problem.totals(without.choices[0])["kv"] > budget  # so it is the budget that decides


def test_an_unreachable_budget_is_named():
    problem = replace(make_problem(1), budgets={"size": 1.0})
    with pytest.raises(MpqError, match="budget of 1 size is below the smallest"):
        integer(problem)
    with pytest.raises(MpqError, match="no budget"):
        integer(make_problem(1))


@pytest.mark.parametrize("last", [False, True])
def test_only_the_budgets_that_conflict_are_named(last):
    """Two conflicting costs, and a third that every choice meets, in first or last position."""
    problem = make_problem(1, layers=4)
    size = problem.costs["size"]
    problem = replace(problem, costs={**problem.costs, "precision": size.max() - size})
    tight = {name: between(problem, name, 0.2) for name in ("size", "precision")}
    loose = {"bitops": 1e12}
    budgets = {**tight, **loose} if last else {**loose, **tight}
    with pytest.raises(MpqError, match="the budgets of size and precision cannot be met together"):
        integer(replace(problem, budgets=budgets))
