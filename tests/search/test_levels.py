"""Levels, their repair and their mutations, against plain statements of what each must be."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from problems import make_problem

from mpq.core.errors import MpqError
from mpq.search.levels import SWITCHES, level_space


def made(seed, layers=5, share=None, names=("size", "bitops")):
    """A space by size, with budgets at a share of each cost's range."""
    problem = make_problem(seed, layers)
    possible = np.isfinite(problem.losses)
    budgets = {}
    for name in names if share is not None else ():
        low = np.where(possible, problem.costs[name], np.inf).min(1).sum()
        high = np.where(possible, problem.costs[name], -np.inf).max(1).sum()
        budgets[name] = float(low + share * (high - low))
    return level_space(replace(problem, budgets=budgets), "size")


@pytest.mark.parametrize("seed", range(9))
def test_levels_are_the_possible_schemes_by_rising_cost(seed):
    space = made(seed)
    problem = space.problem
    for group, (row, size) in enumerate(zip(space.schemes, space.sizes, strict=True)):
        possible = np.flatnonzero(np.isfinite(problem.losses[group])).tolist()
        assert sorted(row[:size].tolist()) == possible
        assert (np.diff(problem.costs["size"][group, row[:size]]) >= 0).all()
        assert set(row[size:].tolist()) <= {row[size - 1]}
    for levels in map(np.array, product(*(range(size) for size in space.sizes[:2]), *([0],) * 3)):
        choices = space.choices(levels)
        assert space.levels(choices).tolist() == levels.tolist()
        assert space.loss(levels) == pytest.approx(problem.losses[np.arange(5), choices].sum())
    with pytest.raises(MpqError, match="unknown cost 'time'"):
        level_space(problem, "time")


@pytest.mark.parametrize("seed", range(6))
def test_excess_is_the_largest_overrun(seed):
    space = made(seed, share=0.4)
    random = np.random.default_rng(seed)
    for _ in range(20):
        levels = random.integers(space.sizes)
        totals = space.problem.totals(space.choices(levels))
        shares = [totals[name] / budget - 1 for name, budget in space.problem.budgets.items()]
        assert space.excess(levels) == pytest.approx(max(shares))
    assert made(seed).excess(levels) == -1


@pytest.mark.parametrize("seed", range(12))
def test_repair_takes_the_step_of_least_loss_per_excess_saved(seed):
    """Until a budget is met exactly, the steps are those of trying every group's step each time."""
    space = made(seed, share=0.3)
    levels = space.sizes - 1
    steps = 0
    expected = levels.copy()
    while space.excess(expected) > 0:
        scored = []
        for group in np.flatnonzero(expected).tolist():
            lowered = expected.copy()
            lowered[group] -= 1
            rise = space.loss(lowered) - space.loss(expected)
            saved = min(space.excess(expected), space.excess(expected) - space.excess(lowered))
            if saved > 0:
                scored.append((rise / saved if rise > 0 else rise, group))
        expected[min(scored)[1]] -= 1
        steps += 1
    assert steps > 0
    assert space.repaired(levels).tolist() == expected.tolist()
    assert levels.tolist() == (space.sizes - 1).tolist()  # the argument is left as it is
    assert space.repaired(expected).tolist() == expected.tolist()


@pytest.mark.parametrize("share", [0.3, 1.0, None])
def test_mutations_raise_few_groups_and_lower_others(share):
    space = made(1, layers=8, share=share)
    random = np.random.default_rng(0)
    parent = space.repaired(space.sizes - 2)
    raised, lowered = set(), set()
    for _ in range(400):
        child = space.switched(parent, random)
        if child is None:
            continue
        step = child - parent
        assert step.any()
        assert space.excess(child) <= 0
        assert ((child >= 0) & (child < space.sizes)).all()
        raised.add(int(step[step > 0].sum()))
        lowered.add(int(-step[step < 0].sum()))
    assert max(raised) == SWITCHES == 3
    if share == 0.3:
        assert max(lowered) > 1  # as many as the budgets take
    else:
        assert lowered == {0, 1}  # one more now and then, though no budget asks for it
    assert len(parent) == 8


def test_groups_at_their_last_level_are_not_raised():
    space = made(1, layers=4)
    random = np.random.default_rng(0)
    top = space.sizes - 1
    children = [space.switched(top, random) for _ in range(50)]
    lowered = [int((top - child).sum()) for child in children if child is not None]
    assert set(lowered) == {1}
    assert any(child is None for child in children)
    tight = made(1, layers=4, share=0.0)
    bottom = np.zeros(4, dtype=np.intp)
    assert tight.excess(bottom) <= 0
    assert all(tight.switched(bottom, random) is None for _ in range(20))  # nothing else is left to lower


def test_child_is_the_best_candidate():
    """With many candidates of one parent, the new one of least predicted loss; known ones are never given again."""
    space = made(2, layers=4, share=0.5)
    parent = space.repaired(space.sizes - 1)
    every = [space.switched(parent, np.random.default_rng(seed)) for seed in range(300)]
    best = min(space.loss(child) for child in every if child is not None)
    found = space.child([parent], np.random.default_rng(0), lambda child: True, 150)
    assert space.loss(found) == pytest.approx(best)
    known = {tuple(found.tolist())}
    other = space.child([parent], np.random.default_rng(0), lambda child: tuple(child.tolist()) not in known, 150)
    assert tuple(other.tolist()) not in known
    assert space.child([parent], np.random.default_rng(0), lambda child: False, 3) is None
    calls = []
    space.child([parent], np.random.default_rng(0), lambda child: calls.append(child) or True, 3)
    assert len(calls) == 3


def test_child_falls_back_to_a_random_one_within_budgets():
    """A parent with no neighbour that is new: any other new levels are taken."""
    space = made(2, layers=4, share=0.5)
    parent = space.repaired(space.sizes - 1)

    def far(child):
        return int(np.abs(child - parent).sum()) > 2 * SWITCHES + 2

    child = space.child([parent], np.random.default_rng(0), far, 4)
    assert far(child)
    assert space.excess(child) <= 0
