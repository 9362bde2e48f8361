"""The quadratic program against enumeration, with ties, restrictions, budgets and a valid gap."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import every_choice, make_problem, make_table

from mpq.core.errors import MpqError
from mpq.core.interactions import Interactions
from mpq.core.problem import build_problem
from mpq.search import frontier_of
from mpq.search.integer import integer
from mpq.search.pairwise import pairwise


def make_interactions(problem, seed, strength=1.0, density=1.0):
    random = np.random.default_rng(seed)
    shape = (len(problem.layers), len(problem.schemes))
    losses = random.lognormal(0, 1, shape)
    pairs = strength * random.normal(size=shape + shape)
    pairs *= (random.random((shape[0], shape[0])) < density)[:, None, :, None]
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[range(shape[0]), :, range(shape[0])] = 0
    # in an order of its own: names must be looked up
    layers, schemes = random.permutation(shape[0]), random.permutation(shape[1])
    return Interactions(
        tuple(problem.layers[i].name for i in layers), tuple(problem.schemes[j] for j in schemes),
        losses[layers][:, schemes], pairs[np.ix_(layers, schemes, layers, schemes)],
    )  # fmt: skip


def total(problem, interactions, choices):
    by_layer = {
        problem.layers[i].name: problem.schemes[c] for g, c in zip(problem.groups, choices, strict=True) for i in g
    }
    return interactions.total([interactions.schemes.index(by_layer[name]) for name in interactions.layers])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 1), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_the_optimum_is_that_of_enumeration(seed, layers, share, density, tie):
    problem = build_problem(make_table(seed, layers, tie=True)) if tie else make_problem(seed, layers)
    cost = np.where(np.isfinite(problem.losses), problem.costs["size"], np.nan)
    low, high = np.nanmin(cost, 1).sum(), np.nanmax(cost, 1).sum()
    problem = replace(problem, budgets={"size": low + share * (high - low)})
    interactions = make_interactions(problem, seed, density=density)
    choices = every_choice(problem)
    sizes = problem.costs["size"][np.arange(len(problem.groups)), choices].sum(1)
    best = min(total(problem, interactions, c) for c in choices[sizes <= problem.budgets["size"] * (1 + 1e-9)])
    found = pairwise(problem, interactions=interactions)
    assert found.losses[0] == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert total(problem, interactions, found.choices[0]) == pytest.approx(found.losses[0], rel=1e-9, abs=1e-9)
    assert found.gap == 0


def test_without_interactions_it_is_the_integer_program():
    problem = make_problem(1, 12)
    problem = replace(problem, budgets={"size": float(problem.costs["size"].mean(1).sum())})
    interactions = make_interactions(problem, 1, strength=0.0)
    alone = replace(problem, losses=interactions.losses[
        np.ix_([interactions.layers.index(layer.name) for layer in problem.layers],
               [interactions.schemes.index(scheme) for scheme in problem.schemes])])  # fmt: skip
    found = pairwise(problem, interactions=interactions)
    assert found.losses[0] == pytest.approx(integer(alone).losses[0], rel=1e-6)
    assert found.allocation(0).loss == pytest.approx(found.losses[0])


def test_stopping_early_reports_the_gap():
    problem = make_problem(1, 40)
    problem = replace(problem, budgets={"size": float(problem.costs["size"].mean(1).sum())})
    interactions = make_interactions(problem, 1, strength=0.3)
    found = pairwise(problem, interactions=interactions, time_limit=4.0)
    assert found.gap > 0
    assert problem.totals(found.choices[0])["size"] <= problem.budgets["size"] * (1 + 1e-9)


def test_invalid_arguments_are_refused():
    problem = replace(make_problem(1), budgets={"size": 1e9})
    interactions = make_interactions(problem, 1)
    with pytest.raises(MpqError, match="needs at least one"):
        pairwise(replace(problem, budgets={}), interactions=interactions)
    with pytest.raises(MpqError, match="lack the layer layer4"):
        pairwise(problem, interactions=make_interactions(make_problem(1, 4), 1))
    with pytest.raises(MpqError, match="below the smallest allocation"):
        pairwise(replace(problem, budgets={"size": 1.0}), interactions=interactions)


def test_missing_inputs_of_a_search_are_reported():
    with pytest.raises(MpqError, match="the search pairwise also needs interactions: measure"):
        frontier_of(make_table(0, 3), search="pairwise", budgets={"size": 1e6})
