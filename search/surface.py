"""Trading loss against two costs at once: a surface of proven optima, by epsilon-constraints on the integer program."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import Array, Problem
from mpq.search.integer import check_budgets, integer


@dataclass(frozen=True, eq=False)
class Surface:
    """Allocations of which none is at most as costly in both and at most as lossy as another, by rising first cost."""

    problem: Problem
    names: tuple[str, str]
    costs: Array  # (points, 2)
    losses: Array  # (points,)
    choices: tuple[NDArray[np.intp], ...]

    def __len__(self) -> int:
        return len(self.losses)

    def allocation(self, index: int) -> Allocation:
        """The allocation of a point."""
        return self.problem.allocation(self.choices[index])


def surface(problem: Problem, costs: tuple[str, str] = ("size", "bitops"), *, steps: int = 8) -> Surface:
    """The allocations of least predicted loss under budgets of both costs, on a grid of such budgets.

    The grid divides each cost's range, from the cheapest allocation to the one of least loss, into `steps` steps. Every
    point is optimal within its costs; points between the grid's budgets are not searched.

    Args:
        problem: further budgets, and those of the two costs, are kept.
        costs: names of two different costs.
        steps: budgets of each cost.

    Raises:
        MpqError: unknown or equal costs, or budgets that cannot be met.
    """
    first, second = costs
    for name in costs:
        if name not in problem.costs:
            raise MpqError(f"unknown cost {name!r}: expected one of {', '.join(problem.costs)}")
    if first == second or steps < 2:
        raise MpqError(
            f"invalid surface: expected two different costs and at least two steps, not {first}, {second}, {steps}"
        )
    if problem.budgets:
        check_budgets(problem)
    grids = [_budgets(problem, name, steps) for name in costs]
    points: dict[tuple[int, ...], NDArray[np.intp]] = {}
    for budget in grids[0]:
        for other in grids[1]:
            try:
                point = integer(replace(problem, budgets={**problem.budgets, first: budget, second: other}), cost=first)
            except MpqError:  # both can be met, but not together
                continue
            points[tuple(int(choice) for choice in point.choices[0])] = np.asarray(point.choices[0], np.intp)
    if not points:
        integer(problem, cost=first)  # says which budget cannot be met
    choices = list(points.values())
    totals = np.array([[problem.totals(one)[name] for name in costs] for one in choices])
    losses = np.array([problem.losses[np.arange(len(one)), one].sum() for one in choices])
    kept = _non_dominated(np.column_stack([totals, losses]))
    return Surface(problem, costs, totals[kept], losses[kept], tuple(choices[i] for i in kept.tolist()))


def cheapest(problem: Problem, *, loss: float, cost: str = "size") -> Frontier:
    """The allocation of least cost whose predicted loss is at most `loss`, within all budgets: a frontier of one point.

    Of several that cost the same it is the one of least loss.

    Raises:
        MpqError: an unknown cost, a loss that nothing reaches (with the range that is), or budgets that cannot be met
            with it.
    """
    if cost not in problem.costs:
        raise MpqError(f"unknown cost {cost!r}: expected one of {', '.join(problem.costs)}")
    possible = np.isfinite(problem.losses)
    least = float(problem.losses.min(1).sum())
    if not loss >= least:
        most = _loss_of_cheapest(problem, cost)
        raise MpqError(
            f"a predicted loss of {loss:g} is below that of every allocation: {least:.6g} to {most:.6g} can be "
            f"reached, the last by the one of least {cost}"
        )
    swapped = replace(
        problem,
        losses=np.where(possible, problem.costs[cost], np.inf),
        costs={**problem.costs, "loss": np.where(possible, problem.losses, 0.0)},
        budgets={**problem.budgets, "loss": loss},
    )
    (choices,) = integer(swapped, cost=cost).choices
    total = problem.totals(choices)[cost]
    within = replace(problem, budgets={**problem.budgets, cost: total * (1 + 1e-12)})
    (better,) = integer(within, cost=cost).choices
    losses = [problem.prediction(one)[0] for one in (choices, better)]
    best = better if losses[1] < losses[0] else choices
    return Frontier(problem, np.array([problem.totals(best)[cost]]), np.array([min(losses)]), [best], cost)


def _loss_of_cheapest(problem: Problem, cost: str) -> float:
    """Least predicted loss among the allocations of least cost."""
    costs = np.where(np.isfinite(problem.losses), problem.costs[cost], np.inf)
    return float(np.where(costs == costs.min(1, keepdims=True), problem.losses, np.inf).min(1).sum())


def _budgets(problem: Problem, name: str, steps: int) -> list[float]:
    cost = problem.costs[name]
    low = float(np.where(np.isfinite(problem.losses), cost, np.inf).min(1).sum())
    rows = np.arange(len(cost))
    tied = problem.losses == problem.losses.min(1, keepdims=True)
    best = np.where(tied, cost, np.inf).argmin(1)
    high = min(float(cost[rows, best].sum()), problem.budgets.get(name, np.inf))
    grid: list[float] = np.linspace(low, max(low, high), steps).tolist()
    return [budget * (1 + 1e-12) for budget in grid]


def _non_dominated(points: Array) -> NDArray[np.intp]:
    """Indices of the points (number, objectives) that no other equals or beats in all; of equal points the first."""
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    for index in order.tolist():
        if not any((points[other] <= points[index]).all() for other in kept):
            kept.append(index)
    return np.array(kept, np.intp)
