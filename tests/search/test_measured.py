"""Starts are within the budget, beliefs follow measurements, and polishing corrects a wrong table."""

from dataclasses import replace

import numpy as np
import pytest
from problems import every_choice, make_problem, make_table

from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.search.exact import exact
from mpq.search.measured import Belief, nearby, polish, race, ranked, starts


def sizes(problem, choices):
    return problem.totals(choices)["size"]


def test_starts_are_the_optimum_uniform_formats_and_optima_without_the_smallest_widths():
    problem = build_problem(make_table(1, 8))
    frontier = exact(problem)
    size = sizes(problem, np.full(8, 2))  # int4-channel for all
    found = dict(starts(frontier, size))
    assert next(iter(found)) == "searched"
    assert all(sizes(problem, choices) <= size for choices in found.values())
    assert found["all int4-channel"].tolist() == [2] * 8
    assert "searched from 3 bits" in found
    assert 0 not in found["searched from 3 bits"]
    best = min(
        (choice for choice in every_choice(problem) if 0 not in choice and sizes(problem, choice) <= size),
        key=lambda choice: problem.prediction(choice)[0],
    )
    assert found["searched from 3 bits"].tolist() == best.tolist()


def test_whole_layers_are_a_start_where_rows_may_differ():
    layers = tuple(Layer(f"l{i}", "linear", 64, 256) for i in range(4))
    schemes = ("int2-g64", "int2-g64/int4-g64@3.25", "int4-g64")
    scores = np.array([[4.0, 1.0, 0.5]]) * np.array([[1.0], [2.0], [4.0], [8.0]])
    problem = build_problem(SensitivityTable(layers, schemes, scores, 0 * scores, "made"))
    size = sizes(problem, np.array([0, 0, 2, 2]))
    found = dict(starts(exact(problem), size))
    assert 1 not in found["searched by whole layers"]
    assert found["searched by whole layers"].tolist() == [0, 0, 2, 2]
    assert 1 in found["searched"]
    plain = build_problem(SensitivityTable(layers, schemes[::2], scores[:, ::2], 0 * scores[:, ::2], "made"))
    assert "searched by whole layers" not in dict(starts(exact(plain), size))


def test_nearby_is_the_best_within_the_radius():
    problem = make_problem(2, 5)
    center = np.full(5, 1)
    size, radius = 1.1 * sizes(problem, center), 2
    near = [
        choice
        for choice in every_choice(problem)
        if sizes(problem, choice) <= size and (choice != center).sum() <= radius
    ]
    best = min(near, key=lambda choice: problem.prediction(choice)[0])
    assert nearby(problem, problem.losses, center, radius, size).tolist() == best.tolist()


def test_the_posterior_moves_to_the_measurement():
    problem = make_problem(1, 4)
    origin, other = np.zeros(4, dtype=int), np.array([3, 0, 0, 0])
    belief = Belief.of(problem, origin, problem.prediction(origin)[0])
    belief.learn(other, 0.0, 1e-9)
    table = belief.expected()
    assert table[0, 3] - table[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert table[1:] == pytest.approx(belief.mean[1:])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_polishing_recovers_from_a_table_that_is_wrong_about_two_layers(seed):
    problem = make_problem(1, 10)
    truth = problem.losses.copy()
    wrong = problem.losses.copy()
    wrong[2] *= 0.2
    wrong[5] *= 5
    misled = replace(problem, losses=wrong)
    frontier = exact(misled)
    size = float(np.median(frontier.costs))
    start = np.asarray(frontier.choices[frontier.index_at(cost=size)], dtype=np.intp)
    groups = np.arange(10)

    def measure(choices):
        each = truth[groups, choices].sum()
        return each * (1 + 0.05 * np.random.default_rng(7).standard_normal(64))  # the same samples each time

    found = polish(misled, start, size, [measure], rounds=30, seed=seed)
    best = exact(problem)
    optimum, before, after = (
        truth[groups, choices].sum() for choices in (best.choices[best.index_at(cost=size)], start, found.choices)
    )
    assert sizes(problem, found.choices) <= size
    assert len(found.measured) <= 31
    assert before > 1.2 * optimum
    assert after - optimum < 0.35 * (before - optimum)


def test_unmeasurable_candidates_are_not_chosen():
    problem = make_problem(1, 4)
    start = np.full(4, 1)

    def measure(choices):
        return np.full(8, 1.0 if (choices == start).all() else np.nan)

    assert polish(problem, start, 2 * sizes(problem, start), [measure], rounds=5).choices.tolist() == start.tolist()


def test_where_there_is_one_choice_nothing_is_proposed():
    problem = build_problem(make_table(1, 3, ("int4-channel",)))
    only = np.zeros(3, dtype=np.intp)
    assert nearby(problem, problem.losses * 0, only, 2, sizes(problem, only)).tolist() == [0, 0, 0]
    found = polish(problem, only, sizes(problem, only), [lambda choices: np.ones(4)], rounds=9)
    assert len(found.measured) == 1


def test_scores_averaged_over_a_kind_are_a_start():
    layers = tuple(Layer(f"blocks.{i}.{name}", "linear", 64, 64) for i in range(4) for name in ("up", "down"))
    scores = np.array([[8.0, 1.0]]) * np.array([[1.0, 3.0, 3.1, 1.0, 1.0, 3.0, 1.0, 3.0]]).T  # one block off its kind
    problem = build_problem(SensitivityTable(layers, ("int2-g64", "int4-g64"), scores, 0 * scores, "made"))
    size = sizes(problem, np.array([0, 1] * 4))
    found = dict(starts(exact(problem), size))
    assert found["searched by kind"].tolist() == [0, 1] * 4
    assert found["searched"].tolist() == [0, 1, 1, 0, 0, 1, 0, 1]


def test_clearly_worse_candidates_are_dropped_early():
    best = np.random.default_rng(0).standard_normal(16)
    parts = [lambda choices: best[:8] + choices[0], lambda choices: best[8:] + choices[0]]
    assert len(race(np.array([3]), parts, best)) == 8
    assert len(race(np.array([-3]), parts, best)) == 16
    assert len(race(np.array([3]), parts)) == 16
    broken = [lambda choices: np.full(8, np.inf), lambda choices: pytest.fail("measured on")]
    assert np.isinf(race(np.array([0]), broken, best)).all()


def test_partly_measured_starts_are_ranked_by_loss():
    noise = np.random.default_rng(1).standard_normal(32)
    asked = []

    def part(own):
        def measure(choices):
            asked.append(len(own))
            return own + (np.inf if choices[0] == 9 else choices[0])

        return measure

    starts = [(str(number), np.array([number])) for number in (9, 5, 2, 7, 3, 1)]
    found, losses = ranked(starts, [part(noise[:8]), part(noise[8:])])
    assert [name for name, _ in found] == ["1", "2", "3", "5", "7", "9"]
    assert losses == pytest.approx(noise + 1)
    assert asked.count(24) == 4  # 9, the first; 5, 2 and 1, better than all before


def test_polishing_reuses_measurements_of_the_start():
    problem = make_problem(1, 6)
    start = np.full(6, 1)
    asked = []

    def measure(choices):
        asked.append(choices.tolist())
        return np.ones(16) * problem.prediction(choices)[0]

    polish(problem, start, sizes(problem, start), [measure], rounds=3, measured=measure(start))
    assert asked.count(start.tolist()) == 1
