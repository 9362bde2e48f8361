"""Rules raise layers in their order within the size, and never choose forbidden formats."""

import numpy as np
import pytest
from problems import make_problem, make_table

from mpq.core.problem import build_problem
from mpq.search.rules import raised, rules


def widths(problem, choices):
    return [problem.schemes[choice] for choice in choices]


def size_of(problem, level):
    return problem.totals(np.full(len(problem.groups), level))["size"]


def test_the_first_of_the_order_are_raised_while_they_fit():
    problem = build_problem(make_table(1, 6))
    low, high = size_of(problem, 1), size_of(problem, 2)
    step = problem.costs["size"][:, 2] - problem.costs["size"][:, 1]
    order = [4, 2, 0, 1, 3, 5]
    choices = raised(problem, low + step[4] + step[2], order)
    assert [choices[group] for group in order] == [2, 2, 1, 1, 1, 1]
    assert (raised(problem, high, order) == 2).all()
    assert (raised(problem, low, order) == 1).all()
    assert raised(problem, size_of(problem, 0) - 1, order) is None


def test_first_and_last_layers_and_blocks_come_first():
    problem = build_problem(make_table(1, 6))
    step = problem.costs["size"][:, 2] - problem.costs["size"][:, 1]
    found = rules(problem, size_of(problem, 1) + step[0] + step[5])
    assert set(np.flatnonzero(found["ends first"] == 2)) == {0, 5}
    assert set(np.flatnonzero(found["outer blocks first"] == 2)) == {0, 5}


def test_pinned_and_forbidden_formats_are_kept():
    table = make_table(1, 4)
    pinned, narrow = table.layers[1].name, table.schemes[0]
    problem = build_problem(table, pin={pinned: table.schemes[-1]}, forbid={table.layers[2].name: narrow})
    for choices in rules(problem, problem.totals(np.array([0, len(table.schemes) - 1, 1, 0]))["size"]).values():
        assert np.isfinite(problem.losses[np.arange(4), choices]).all()
        assert widths(problem, choices)[1] == table.schemes[-1]


@pytest.mark.parametrize("seed", range(12))
def test_rules_match_loops_over_groups(seed):
    """Groups with fewer possible formats stay at their widest; seeds divisible by three forbid some."""
    problem = make_problem(seed, 6)
    cost, random = problem.costs["size"], np.random.default_rng(seed)
    steps = [sorted(np.flatnonzero(np.isfinite(row)).tolist(), key=lambda j, own=own: own[j])
             for row, own in zip(problem.losses, cost, strict=True)]  # fmt: skip

    def size_at(levels):
        return sum(cost[g, steps[g][min(level, len(steps[g]) - 1)]] for g, level in enumerate(levels))

    most = max(map(len, steps))
    for size in random.uniform(size_at([0] * 6), size_at([most] * 6), 8):
        for name, order in (("ends first", [0, 5, 1, 2, 3, 4]), ("outer blocks first", [0, 5, 1, 4, 2, 3])):
            level = max(level for level in range(most) if size_at([level] * 6) <= size)
            levels = [level] * 6
            for group in order:
                raised_levels = [*levels]
                raised_levels[group] += 1
                if size_at(raised_levels) <= size:
                    levels = raised_levels
            expected = [steps[g][min(level, len(steps[g]) - 1)] for g, level in enumerate(levels)]
            assert rules(problem, size)[name].tolist() == expected
