import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, make_problem, make_table

from mpq.core.errors import MpqError
from mpq.core.problem import build_problem
from mpq.search.exact import exact


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(["size", "bitops"]))
def test_the_frontier_is_that_of_enumeration(seed, layers, cost):
    problem = make_problem(seed, layers)
    frontier = exact(problem, cost=cost)
    costs, losses = brute_force(problem, cost)
    assert frontier.gap == 0
    np.testing.assert_allclose(frontier.costs, costs, rtol=1e-12)
    np.testing.assert_allclose(frontier.losses, losses, rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_costs_without_a_common_divisor_and_negative_losses(seed, layers):
    problem = make_problem(seed, layers)
    random = np.random.default_rng(seed)
    shape = problem.losses.shape
    problem = replace(
        problem, losses=problem.losses - random.random((len(shape), 1))[0], costs={"latency": random.random(shape)}
    )
    frontier = exact(problem, cost="latency")
    costs, losses = brute_force(problem, "latency")
    np.testing.assert_allclose(frontier.costs, costs, rtol=1e-9)
    np.testing.assert_allclose(frontier.losses, losses, rtol=1e-9, atol=1e-12)


def test_every_point_is_what_its_choices_add_up_to():
    problem = build_problem(make_table(5, layers=40, tie=True))
    frontier = exact(problem)
    assert len(frontier) > 500
    for index in range(0, len(frontier), 50):
        allocation = frontier.allocation(index)
        assert allocation.size == frontier.costs[index]
        assert allocation.loss == pytest.approx(frontier.losses[index], rel=1e-9)
    assert [allocation.size for allocation in frontier][::100] == frontier.costs[::100].tolist()


def test_a_budget_cuts_the_frontier():
    problem = make_problem(1)
    whole = exact(problem)
    cut = exact(replace(problem, budgets={"size": whole.costs[4]}))
    np.testing.assert_array_equal(cut.costs, whole.costs[:5])
    with pytest.raises(MpqError, match="below the smallest"):
        exact(replace(problem, budgets={"size": 1.0}))


def test_too_few_states_give_a_gap_that_holds():
    problem = build_problem(make_table(7, layers=40))
    rough, best = exact(problem, max_states=40), exact(problem)
    assert best.gap == 0
    assert 0 < rough.gap < 1
    for cost, loss in zip(rough.costs, rough.losses, strict=True):
        truth = best.losses[best.index_at(cost=cost)]
        assert truth <= loss * (1 + 1e-9)
        assert truth >= loss * (1 - rough.gap) - 1e-12


def test_one_scheme_and_one_layer():
    table = make_table(1, layers=1, schemes=("int4-g64",))
    frontier = exact(build_problem(table))
    assert len(frontier) == 1
    assert frontier.allocation(0).schemes == ("int4-g64",)


def test_unknown_costs_and_other_budgets_are_refused():
    with pytest.raises(MpqError, match="unknown cost 'watts'"):
        exact(make_problem(1), cost="watts")
    with pytest.raises(MpqError, match="does not support budgets of bitops: search by 'integer'"):
        exact(replace(make_problem(1), budgets={"bitops": 1e9}))


def test_a_hundred_llama_shaped_layers_take_less_than_a_second():
    schemes = ("int2-g64", "int2-g128", "int3-g64", "int3-g128", "int4-g32", "int4-g128", "int6-g128", "int8-channel")
    table = make_table(3, layers=100, schemes=schemes)
    layers = tuple(replace(layer, rows=4096 if i % 7 < 4 else 11008, cols=4096) for i, layer in enumerate(table.layers))
    start = time.perf_counter()
    frontier = exact(build_problem(replace(table, layers=layers)))
    assert time.perf_counter() - start < 10  # 0.2 s on an idle core
    assert frontier.gap == 0
