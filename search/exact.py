"""The exact frontier of the multiple-choice knapsack, at all budgets at once.

A multiplier that turns cost into loss gives every group a best choice, and every other choice a regret. A solution
whose regrets add up to more than the gap between the best known solution and the multiplier's bound is not on the
frontier (reduced-cost fixing, as in Pisinger's "A minimal algorithm for the multiple-choice knapsack problem", EJOR
1995). So the frontier is cut into stretches with a multiplier each, where few choices of few groups remain; those are
merged with dominance pruning. Passes over a stretch search wider and wider, until the gap is closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier, non_dominated
from mpq.core.problem import Array, Problem

Choices = NDArray[np.int16]

MOVES = 12  # moves along the convex hull in one stretch
FIRST_PASS = 0.03  # share of the hull's gap that the first pass over a stretch searches
WIDER = 2.0  # growth of the searched share from pass to pass, until the gap is closed
ROUNDING = 1e-12  # relative slack of comparisons between sums


def exact(problem: Problem, *, cost: str = "size", max_states: int = 200_000) -> Frontier:
    """The exact Pareto frontier of cost and predicted loss.

    Args:
        problem: a budget on the cost itself cuts the frontier; budgets on others need the integer program.
        cost: which of the problem's costs is traded against the loss.
        max_states: partial solutions kept at once; if they do not suffice, the frontier's `gap` bounds the error.

    Raises:
        MpqError: an unknown cost, budgets on other costs, or one that nothing meets.
    """
    if cost not in problem.costs:
        raise MpqError(f"unknown cost {cost!r}: expected one of {', '.join(problem.costs)}")
    others = sorted(problem.budgets.keys() - {cost})
    if others:
        raise MpqError(
            f"the exact frontier in {cost} does not support budgets of {', '.join(others)}: search by 'integer'"
        )
    losses = _without_dominated(problem.costs[cost], problem.losses)
    hull = _hull(problem.costs[cost], losses)
    stretches = [
        _solve(problem.costs[cost], losses, hull, slice(first, min(first + MOVES, len(hull.slopes))), max_states)
        for first in range(0, len(hull.slopes), MOVES)
    ]
    stretches.append(
        _Stretch(hull.costs[-1:], hull.losses[-1:], hull.last, np.empty(0, np.intp), np.empty((1, 0), np.int16))
    )
    all_costs = np.concatenate([stretch.costs for stretch in stretches])
    all_losses = np.concatenate([stretch.losses for stretch in stretches])
    kept = non_dominated(all_costs, all_losses)
    same = np.diff(all_costs[kept]) <= ROUNDING * np.abs(all_costs[kept[1:]])  # duplicates, summed in another order
    kept = kept[~np.append(same, False)]
    gap = max(stretch.gap(all_costs[kept], all_losses[kept]) for stretch in stretches)
    kept = kept[all_costs[kept] <= problem.budgets.get(cost, np.inf)]
    if not len(kept):
        raise MpqError(f"a budget of {problem.budgets[cost]:.15g} {cost} is below the smallest, {hull.costs[0]:.15g}")
    return Frontier(problem, all_costs[kept], all_losses[kept], _Lazy(stretches, kept), cost, gap)


@dataclass(frozen=True, eq=False)
class _Hull:
    """Solutions of the linear relaxation without fractions: from all cheapest, one move at a time by falling slope."""

    costs: Array  # (moves + 1,)
    losses: Array  # (moves + 1,)
    slopes: Array  # (moves,), loss saved per cost
    last: Choices  # (groups,), the choice of least loss


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Solutions that share the choices of all groups but a few."""

    costs: Array  # (points,)
    losses: Array  # (points,)
    base: Choices  # (groups,)
    free: NDArray[np.intp]  # (free groups,)
    choices: Choices  # (points, free groups)
    regret: float = 0.0  # largest sum of regrets of the solutions searched
    core: "_Core | None" = None  # kept if the stretch is not proven complete

    def gap(self, costs: Array, losses: Array) -> float:
        """Share of a frontier's loss by which a solution of this stretch that was not looked at could be better."""
        if self.core is None:
            return 0.0
        first, last = np.searchsorted(costs, [self.core.low, self.core.high], side="left")
        first = max(first - 1, 0)  # the last point before the stretch covers costs below its first
        excess = self.core.excess(costs[first:last], losses[first:last]) - self.regret
        return float(max((excess / np.abs(losses[first:last])).max(), 0.0))

    def choice(self, point: int) -> Choices:
        whole = self.base.copy()
        whole[self.free] = self.choices[point]
        return whole


class _Lazy(Sequence[Choices]):
    """Choices of the frontier's points, put together when asked for."""

    def __init__(self, stretches: Sequence[_Stretch], kept: NDArray[np.intp]) -> None:
        self.stretches, self.kept = stretches, kept
        self.starts = np.cumsum([0, *(len(stretch.costs) for stretch in stretches)])

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Choices: ...
    @overload
    def __getitem__(self, index: slice) -> list[Choices]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        point = self.kept[index]
        stretch = int(np.searchsorted(self.starts, point, side="right")) - 1
        return self.stretches[stretch].choice(int(point - self.starts[stretch]))


def _without_dominated(costs: Array, losses: Array) -> Array:
    """Losses with inf for choices that another of the group equals or beats in both."""
    kept = np.full_like(losses, np.inf)
    for group in range(len(costs)):
        chosen = non_dominated(costs[group], losses[group])
        kept[group, chosen] = losses[group, chosen]
    return kept


def _hull(costs: Array, losses: Array) -> _Hull:
    slopes, cost_steps, loss_steps = [], [], []
    start, last = np.empty(len(costs), np.int16), np.empty(len(costs), np.int16)
    for group, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        order = non_dominated(cost, loss)
        start[group] = at = order[0]
        last[group] = order[-1]
        while at != order[-1]:
            beyond = order[cost[order] > cost[at]]
            steepness = (loss[at] - loss[beyond]) / (cost[beyond] - cost[at])
            best = beyond[np.flatnonzero(steepness == steepness.max())[-1]]
            slopes.append(float(steepness.max()))
            cost_steps.append(cost[best] - cost[at])
            loss_steps.append(loss[best] - loss[at])
            at = best
    rows = np.arange(len(costs))
    order = np.argsort(-np.array(slopes), kind="stable")
    return _Hull(
        costs[rows, start].sum() + np.concatenate([[0.0], np.cumsum(np.array(cost_steps)[order])]),
        losses[rows, start].sum() + np.concatenate([[0.0], np.cumsum(np.array(loss_steps)[order])]),
        np.array(slopes)[order], last,
    )  # fmt: skip


def _solve(costs: Array, losses: Array, hull: _Hull, moves: slice, max_states: int) -> _Stretch:
    """All frontier solutions whose cost lies in the stretch of these hull moves, its end left out."""
    known_costs, known_losses = hull.costs[moves.start : moves.stop + 1], hull.losses[moves.start : moves.stop + 1]
    core = _Core(costs, losses, float(hull.slopes[(moves.start + moves.stop) // 2]), known_costs[0], known_costs[-1])
    gap = core.gap(known_costs[:-1], known_losses[:-1])
    regret = FIRST_PASS * gap
    while True:
        merged = core.merge(min(regret, gap), max_states)
        gap = core.gap(np.append(known_costs[:-1], merged.costs), np.append(known_losses[:-1], merged.losses))
        if gap <= merged.regret:
            return merged
        if merged.regret < regret:  # more would not be affordable
            return replace(merged, core=core)
        regret *= WIDER


class _Core:
    """The choices that matter under one multiplier, for solutions of a cost in [low, high)."""

    def __init__(self, costs: Array, losses: Array, multiplier: float, low: float, high: float) -> None:
        priced = losses + multiplier * costs
        self.multiplier, self.low, self.high = multiplier, low, high
        self.best = priced.argmin(1).astype(np.int16)
        rows = np.arange(len(costs))
        self.steps = costs - costs[rows, self.best, None]
        self.regrets = priced - priced[rows, self.best, None]
        self.cost, self.loss = float(costs[rows, self.best].sum()), float(losses[rows, self.best].sum())
        self.tolerance = ROUNDING * abs(self.loss)

    def gap(self, costs: Array, losses: Array) -> float:
        """Largest regret that an unknown solution of the stretch could have and not be dominated by a known one."""
        kept = non_dominated(costs, losses)
        return float(self.excess(costs[kept], losses[kept]).max())

    def excess(self, costs: Array, losses: Array) -> Array:
        """Losses above the multiplier's bound at the costs where the next solution takes over."""
        reach = np.append(costs[1:], self.high)
        return losses - self.loss + self.multiplier * (reach - self.cost)

    def merge(self, regret: float, max_states: int) -> _Stretch:
        """Non-dominated solutions of the stretch whose regrets sum up to at most `regret`, or less if too many."""
        limit = proven = regret + self.tolerance
        near = self.regrets <= limit
        free = np.flatnonzero(near.sum(1) > 1)
        smallest = np.partition(self.regrets[free], 1, axis=1)[:, 1]
        free = free[
            np.argsort(-smallest, kind="stable")
        ]  # the groups with many small regrets last, so that there are few sums at first
        options = [row.nonzero()[0] for row in near[free]]
        costs, regrets = np.zeros(1), np.zeros(1)
        history = []
        for group, option in zip(free.tolist(), options, strict=True):
            all_costs = (self.steps[group, option, None] + costs).ravel()
            all_regrets = (self.regrets[group, option, None] + regrets).ravel()
            kept = (all_regrets <= limit).nonzero()[0]
            kept = kept[self._non_dominated(all_costs[kept], all_regrets[kept])]
            if len(kept) > max_states:
                places = all_regrets[kept].argpartition(max_states)  # keep some of equal ones
                proven = np.nextafter(all_regrets[kept[places[max_states]]], -np.inf)
                limit = max(proven, 0.0)
                kept = kept[np.sort(places[:max_states])]
            history.append(np.divmod(kept, len(costs)))
            costs, regrets = all_costs[kept], all_regrets[kept]
        totals = self.cost + costs
        at = np.flatnonzero((totals >= self.low - ROUNDING * abs(self.low)) & (totals < self.high))[::-1]
        losses = self.loss + regrets[at] - self.multiplier * costs[at]
        totals = totals[at]
        choices = np.empty((len(at), len(free)), np.int16)
        for stage in reversed(range(len(free))):
            taken, parents = history[stage]
            choices[:, stage] = options[stage][taken[at]]
            at = parents[at]
        return _Stretch(totals, losses, self.best, free, choices, regret=min(regret, proven))

    def _non_dominated(self, costs: Array, regrets: Array) -> NDArray[np.intp]:
        """Indices of the partial solutions that no other beats in cost and loss, by rising loss."""
        losses = regrets - self.multiplier * costs
        order = losses.argsort(kind="stable")
        by_loss = costs[order]
        kept = np.empty(len(order), dtype=bool)
        kept[0] = True
        np.less(by_loss[1:], np.minimum.accumulate(by_loss)[:-1], out=kept[1:])
        return order[kept]
