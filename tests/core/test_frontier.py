import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import make_problem

from mpq.core.errors import MpqError
from mpq.core.frontier import MEASURED_COLUMN, Frontier, SavedFrontier, non_dominated
from mpq.search.exact import exact

POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


@given(POINTS)
def test_non_dominated_points_are_those_no_other_beats(points):
    costs, losses = [cost for cost, _ in points], [loss for _, loss in points]
    kept = non_dominated(costs, losses)
    chosen = [points[i] for i in kept]
    truth = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(chosen) == truth
    assert len(chosen) == len(truth)
    assert chosen == sorted(chosen)


def test_a_budget_gets_the_best_allocation_within_it():
    frontier = exact(make_problem(1))
    weights = frontier.problem.weights
    for index in range(len(frontier)):
        bits = frontier.bits[index]
        assert frontier.index_at(bits=bits) == index
        assert frontier.index_at(size=frontier.costs[index] + 100) == index
        assert frontier.index_at(cost=frontier.costs[index]) == index
        if index + 1 < len(frontier):
            between = (frontier.costs[index + 1] - 0.5) * 8 / weights
            assert frontier.index_at(bits=between) == index
            assert frontier.at(bits=between).bits <= between


def test_a_budget_above_all_allocations_returns_the_largest_with_a_note(caplog):
    frontier = exact(make_problem(1))
    for budget in ({"bits": 17}, {"size": 1e9}):
        assert frontier.index_at(**budget) == len(frontier) - 1
        assert "larger than any allocation" in caplog.text
        caplog.clear()


def test_errors_of_unreachable_budgets_name_the_range():
    frontier = exact(make_problem(1))
    smallest, largest = frontier.bits[0], 16.0
    with pytest.raises(MpqError, match=f"below the smallest allocation: {smallest:.6g} to {largest:.6g} bits"):
        frontier.at(bits=1.0)
    with pytest.raises(MpqError, match="below the smallest"):
        frontier.at(bits=-1.0)
    for budget in (math.nan, math.inf, "four", True):
        with pytest.raises(MpqError, match=f"invalid budget of {budget!r} bits"):
            frontier.at(bits=budget)
    with pytest.raises(MpqError, match="exactly one budget"):
        frontier.at()
    with pytest.raises(MpqError, match="exactly one budget"):
        frontier.at(bits=4, size=100)


def test_a_frontier_in_another_cost_is_queried_in_that_cost():
    frontier = exact(make_problem(2), cost="bitops")
    assert frontier.at(cost=frontier.costs[3]).bitops == frontier.costs[3]
    with pytest.raises(MpqError, match="in bitops, not in size"):
        frontier.at(bits=4)


def test_hypervolume_is_the_area_below_the_reference():
    problem = make_problem(1)
    frontier = Frontier(problem, np.array([1.0, 3.0]), np.array([5.0, 2.0]), [None, None])
    assert frontier.hypervolume(4, 6) == (3 - 1) * (6 - 5) + (4 - 3) * (6 - 2)
    assert frontier.hypervolume(2, 6) == 1
    assert frontier.hypervolume(1, 6) == 0


def test_the_knee_lies_farthest_below_the_chord():
    problem = make_problem(1)
    frontier = Frontier(problem, np.array([0.0, 1.0, 2.0, 10.0]), np.exp([10.0, 2.0, 0.5, 0.0]), [None] * 4)
    assert frontier.knee() == 2


def test_points_out_of_order_are_refused():
    with pytest.raises(MpqError, match="rising costs"):
        Frontier(make_problem(1), np.array([1.0, 3.0]), np.array([5.0, 5.0]), [None, None])


def test_a_saved_frontier_lists_every_point(tmp_path):
    frontier = exact(make_problem(1))
    frontier.save(tmp_path / "frontier.csv")
    rows = list(csv.DictReader((tmp_path / "frontier.csv").read_text().splitlines()[1:]))
    assert [float(row["size"]) for row in rows] == frontier.costs.tolist()
    assert [float(row["loss"]) for row in rows] == pytest.approx(frontier.losses.tolist())
    assert [rows[3][layer.name] for layer in frontier.problem.layers] == list(frontier.allocation(3).schemes)
    frontier.save(tmp_path / "few.csv", points=5)
    assert len((tmp_path / "few.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("costs", "losses"),
    [([1, 3, 2], [5, 4, 3]), ([1, 2, 3], [5, 3, 4]), ([1, 1], [5, 4]), ([1, 2, 2], [5, 4, 3]), ([1, 2, 3], [5, 4, 4])],
)
def test_one_pair_out_of_order_is_enough(costs, losses):
    with pytest.raises(MpqError, match="rising costs"):
        Frontier(make_problem(1), np.array(costs, dtype=float), np.array(losses, dtype=float), [None] * len(costs))


STEPS = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=0, max_size=8)


@given(STEPS, st.floats(-5, 5))
def test_the_knee_is_the_point_of_greatest_distance(steps, lowest):
    """Distances by the cross product with the chord, from the original coordinates."""
    costs = 3.0 + np.cumsum([0.0, *(step for step, _ in steps)])
    losses = lowest + np.cumsum([0.0, *(drop for _, drop in steps)])[::-1]
    frontier = Frontier(make_problem(1), costs, losses, [None] * len(costs))
    heights = np.log(losses) if lowest > 0 else losses
    chord = np.array([costs[-1] - costs[0], heights[-1] - heights[0]])
    distances = [(x - costs[0]) * chord[1] - (y - heights[0]) * chord[0] for x, y in zip(costs, heights, strict=True)]
    assert distances[frontier.knee()] >= max(distances) - 1e-9 * abs(chord).prod()


def test_the_knee_of_two_points_is_the_last():
    problem = make_problem(1)
    assert Frontier(problem, np.array([0.0, 1.0, 10.0]), np.array([-1.0, -9.0, -10.0]), [None] * 3).knee() == 1
    assert Frontier(problem, np.array([0.0, 1.0]), np.array([2.0, 1.0]), [None] * 2).knee() == 1
    assert Frontier(problem, np.array([0.0]), np.array([2.0]), [None]).knee() == 0


def test_sizes_include_the_overhead():
    frontier = exact(make_problem(1))
    smallest = frontier.costs[0] + frontier.problem.overhead
    assert frontier.problem.overhead == 100
    assert frontier.index_at(size=smallest) == 0
    with pytest.raises(MpqError, match=f"below the smallest allocation: {smallest:.15g} to"):
        frontier.index_at(size=smallest - 1)


def test_a_note_only_where_the_budget_is_larger_than_any_allocation(caplog):
    frontier = exact(make_problem(1))
    possible = np.isfinite(frontier.problem.losses)
    largest = np.where(possible, frontier.problem.costs["size"], -np.inf).max(1).sum()
    within = largest / (1 - 1e-12)
    while within * (1 - 1e-12) > largest:
        within = np.nextafter(within, 0)
    for budget in (frontier.costs[0], 0.6 * largest, largest, within):
        frontier.index_at(cost=budget)
        assert not caplog.text
    frontier.index_at(cost=largest * (1 + 1e-9))
    assert "larger than any allocation" in caplog.text


def test_points_without_a_finite_loss_are_left_out():
    assert non_dominated([1, 2], [math.inf, math.inf]).tolist() == []
    assert non_dominated([1, 2, 3], [math.inf, 3, math.inf]).tolist() == [1]


def test_a_saved_frontier_is_read_with_and_without_measured_losses(tmp_path):
    frontier = exact(make_problem(1))
    frontier.save(tmp_path / "frontier.csv")
    saved = SavedFrontier.load(tmp_path / "frontier.csv")
    assert saved.measured is None
    assert saved.losses == pytest.approx(frontier.losses)
    assert saved.bits == pytest.approx(frontier.bits)
    (tmp_path / "measured.csv").write_text(f"bits,loss,error,{MEASURED_COLUMN},layer\n4.5,0.25,0.5,0.75,int4\n")
    saved = SavedFrontier.load(tmp_path / "measured.csv")
    assert (saved.bits, saved.losses, saved.errors, saved.measured) == (4.5, 0.25, 0.5, 0.75)
