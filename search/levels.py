"""Choices as levels, each group's possible schemes by rising cost, and the moves of evolution between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.problem import Array, Problem

Levels = NDArray[np.intp]  # (groups,)
ATTEMPTS = 200  # attempts at a new child within the budgets
SWITCHES = 3  # groups raised at most in one mutation


@dataclass(frozen=True, eq=False)
class LevelSpace:
    """A problem's choices as numbers from 0, the cheapest possible scheme of a group, to its number of schemes - 1."""

    problem: Problem
    cost: str  # by which levels rise
    schemes: NDArray[np.intp]  # (groups, levels), scheme index; beyond a group's own number its last one repeats
    sizes: Levels  # levels of each group
    costs: Mapping[str, Array]  # (groups, levels), of the budgeted costs
    losses: Array  # (groups, levels)

    def choices(self, levels: Levels) -> NDArray[np.intp]:
        """Scheme index of each group."""
        picked: NDArray[np.intp] = self.schemes[np.arange(len(levels)), levels]
        return picked

    def levels(self, choices: Sequence[int] | NDArray[np.integer]) -> Levels:
        """The inverse of `choices`."""
        return np.array(
            [row.tolist().index(choice) for row, choice in zip(self.schemes, choices, strict=True)], np.intp
        )

    def loss(self, levels: Levels) -> float:
        """Predicted loss."""
        return float(self.losses[np.arange(len(levels)), levels].sum())

    def excess(self, levels: Levels) -> float:
        """Largest overrun of a budget, as a share of it; at most 0 within all of them, and where there are none."""
        rows = np.arange(len(levels))
        budgets = self.problem.budgets
        overruns = (float(self.costs[name][rows, levels].sum() / budget - 1) for name, budget in budgets.items())
        return max(overruns, default=-1.0)

    def repaired(self, levels: Levels) -> Levels:
        """The levels, lowered one step at a time where the predicted loss rises least for the excess it saves."""
        levels = levels.copy()
        rows = np.arange(len(levels))
        while (excess := self.excess(levels)) > 0:
            best, steepness = -1, np.inf
            for group in np.flatnonzero(levels > 0).tolist():
                lowered = levels - (rows == group)
                saved = excess - max(self.excess(lowered), 0.0)
                rise = self.loss(lowered) - self.loss(levels)
                slope = rise / saved if saved > 0 and rise > 0 else rise if saved > 0 else np.inf
                if best < 0 or slope < steepness:
                    best, steepness = group, slope
            levels[best] -= 1
        return levels

    def switched(self, parent: Levels, random: np.random.Generator) -> Levels | None:
        """EvoPress' mutation (arXiv 2410.14649): raise a few groups one level, lower others until the budgets are met.

        Sometimes one more is lowered, since otherwise loose budgets would only raise levels.

        None if the attempt failed.
        """
        child = parent.copy()
        raised = [
            int(random.choice(rest))
            for _ in range(int(random.integers(1, SWITCHES + 1)))
            if len(rest := np.flatnonzero(child < self.sizes - 1))
        ]
        np.add.at(child, raised, 1)
        child = np.minimum(child, self.sizes - 1)
        spare = int(random.integers(2))
        while spare or self.excess(child) > 0:
            lower = np.setdiff1d(np.flatnonzero(child > 0), raised)
            if not len(lower):
                return None
            child[random.choice(lower)] -= 1
            spare = 0
        return None if np.array_equal(child, parent) else child

    def child(
        self, parents: Sequence[Levels], random: np.random.Generator, is_new: Callable[[Levels], bool], candidates: int
    ) -> Levels | None:
        """The child of least predicted loss among `candidates` new ones of random parents.

        If no new child is found near the parents, a random new one within the budgets; None without any.
        """
        children: list[Levels] = []
        for _ in range(ATTEMPTS):
            child = self.switched(parents[int(random.integers(len(parents)))], random)
            if child is not None and is_new(child):
                children.append(child)
                if len(children) == candidates:
                    break
        for _ in range(0 if children else ATTEMPTS):
            child = self.repaired(random.integers(self.sizes))
            if is_new(child):
                return child
        return min(children, key=self.loss) if children else None


def level_space(problem: Problem, cost: str) -> LevelSpace:
    """The levels of a problem, by one of its costs.

    Raises:
        MpqError: an unknown cost.
    """
    if cost not in problem.costs:
        raise MpqError(f"unknown cost {cost!r}: expected one of {', '.join(problem.costs)}")
    orders = [_by_cost(losses, costs) for losses, costs in zip(problem.losses, problem.costs[cost], strict=True)]
    width = max(map(len, orders))
    schemes = np.array([order + [order[-1]] * (width - len(order)) for order in orders], np.intp)
    rows = np.arange(len(orders))[:, None]
    budgeted = {name: problem.costs[name][rows, schemes] for name in problem.budgets}
    sizes = np.array([len(order) for order in orders], np.intp)
    return LevelSpace(problem, cost, schemes, sizes, budgeted, problem.losses[rows, schemes])


def _by_cost(losses: Array, costs: Array) -> list[int]:
    possible = np.flatnonzero(np.isfinite(losses))
    order: list[int] = possible[np.argsort(costs[possible], kind="stable")].tolist()
    return order
