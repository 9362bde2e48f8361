"""HAWQ-V2's frontier (arXiv 1911.03852, section 3.3): a less sensitive layer never gets more precision."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier, non_dominated
from mpq.core.problem import Array, Problem

MAX_STATES = 2_000_000  # solutions held at once, over all precisions


def monotone(problem: Problem, *, cost: str = "size", sensitivities: ArrayLike | None = None) -> Frontier:
    """The Pareto frontier of monotone allocations in cost and predicted loss.

    The groups are sorted by sensitivity; along that order precision, the schemes' order by their total cost, never
    rises. All C(groups + schemes - 1, schemes - 1) such allocations count; dominated starts of them are dropped early.
    The exact frontier, over all allocations, is never above this one.

    Args:
        problem: a budget on the cost itself cuts the frontier.
        cost: which of the problem's costs is traded against the loss.
        sensitivities: (groups,), larger is more sensitive: HAWQ-V2 takes mean Hessian traces. By default the loss for
            each weight in the cheapest scheme that all groups can take.

    Raises:
        MpqError: an unknown cost, budgets on others, sensitivities that do not fit, or no monotone allocation.
    """
    if cost not in problem.costs:
        raise MpqError(f"unknown cost {cost!r}: expected one of {', '.join(problem.costs)}")
    others = sorted(problem.budgets.keys() - {cost})
    if others:
        raise MpqError(
            f"the monotone frontier in {cost} does not support budgets of {', '.join(others)}: search by 'integer'"
        )
    levels = np.argsort(problem.costs[cost].sum(0), kind="stable")[::-1]  # schemes, most precise first
    groups = np.argsort(-_sensitivities(problem, levels, sensitivities), kind="stable")
    start = _Partial(np.zeros(1), np.zeros(1), np.zeros((1, len(levels)), np.int16))
    ends: list[_Partial | None] = [start] + [None] * (len(levels) - 1)  # solutions by the precision of their last group
    for group in groups.tolist():
        ends = _extend(ends, problem.costs[cost][group, levels], problem.losses[group, levels])
    whole = _joined([end for end in ends if end is not None])
    if whole is None:
        raise MpqError("no monotone allocation is possible: too many schemes are pinned or forbidden")
    whole = whole.at(np.flatnonzero(whole.costs <= problem.budgets.get(cost, np.inf)))
    if not len(whole.costs):
        raise MpqError(f"a budget of {problem.budgets[cost]:.15g} {cost} is below the smallest monotone allocation")
    choices = np.empty((len(whole.costs), len(groups)), np.int16)
    for point, counts in enumerate(whole.counts):
        choices[point, groups] = np.repeat(levels, counts)
    return Frontier(problem, whole.costs, whole.losses, list(choices), cost)


@dataclass(frozen=True, eq=False)
class _Partial:
    """Solutions of the groups so far."""

    costs: Array  # (points,)
    losses: Array  # (points,)
    counts: NDArray[np.int16]  # (points, schemes), groups at each precision

    def at(self, points: NDArray[np.intp]) -> "_Partial":
        return _Partial(self.costs[points], self.losses[points], self.counts[points])


def _extend(ends: list[_Partial | None], costs: Array, losses: Array) -> list[_Partial | None]:
    """The solutions with one group more, whose precision is at most that of the last one."""
    extended: list[_Partial | None] = []
    for level in range(len(ends)):
        prefix = None
        if np.isfinite(losses[level]):
            prefix = _joined([end for end in ends[: level + 1] if end is not None])
        if prefix is not None:
            counts = prefix.counts.copy()
            counts[:, level] += 1
            prefix = _Partial(prefix.costs + costs[level], prefix.losses + losses[level], counts)
        extended.append(prefix)
    if sum(len(end.costs) for end in extended if end is not None) > MAX_STATES:
        raise MpqError(f"more than {MAX_STATES} monotone allocations at once: take fewer schemes")
    return extended


def _joined(parts: list[_Partial]) -> _Partial | None:
    if not parts:
        return None
    costs, losses = np.concatenate([part.costs for part in parts]), np.concatenate([part.losses for part in parts])
    kept = non_dominated(costs, losses)
    return _Partial(costs[kept], losses[kept], np.concatenate([part.counts for part in parts])[kept])


def _sensitivities(problem: Problem, levels: NDArray[np.intp], override: ArrayLike | None) -> Array:
    if override is not None:
        sensitivities = np.asarray(override, dtype=np.float64)
        if sensitivities.shape != (len(problem.groups),) or np.isnan(sensitivities).any():
            raise MpqError(
                f"invalid sensitivities: expected a number for each of {len(problem.groups)} groups, without NaN"
            )
        return sensitivities
    possible = [level for level in levels.tolist() if np.isfinite(problem.losses[:, level]).all()]
    if not possible:
        raise MpqError("no scheme is possible for all groups, so their losses cannot be compared: pass sensitivities")
    weights = [sum(problem.layers[layer].params for layer in group) for group in problem.groups]
    per_weight: Array = problem.losses[:, possible[-1]] / np.array(weights)
    return per_weight
