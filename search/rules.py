"""Allocations by simple rules without scores: wider formats for the ends of a network, or for its outer blocks."""

from collections.abc import Sequence

import numpy as np

from mpq.core.problem import Choices, Problem


def rules(problem: Problem, size: float) -> dict[str, Choices]:
    """Choices by name within a size (bytes of the layers): one format for all, and the next for the first of an order.

    "ends first" raises embeddings and the first and last group, then the others in the network's order; "outer blocks
    first" works inwards from both ends. Empty if the smallest formats do not fit.
    """
    count = len(problem.groups)
    embeddings = [group for group in range(count) if problem.layers[problem.groups[group][0]].kind == "embedding"]
    ends = dict.fromkeys([*embeddings, 0, count - 1])
    orders = {
        "ends first": [*ends, *(group for group in range(count) if group not in ends)],
        "outer blocks first": sorted(range(count), key=lambda group: min(group, count - 1 - group)),
    }
    allocations = {name: raised(problem, size, order) for name, order in orders.items()}
    return {name: choices for name, choices in allocations.items() if choices is not None}


def raised(problem: Problem, size: float, order: Sequence[int]) -> Choices | None:
    """The largest step of every group's formats that fits, and one step more for the first groups while that fits.

    A group's steps are the whole formats that it can take, small to large; a group with fewer steps stays at its last.
    """
    costs = problem.costs["size"]
    whole = np.array([not problem.is_mix(scheme) for scheme in range(len(problem.schemes))])
    possible = np.isfinite(problem.losses) & whole
    possible[~possible.any(1)] = np.isfinite(problem.losses[~possible.any(1)])  # pinned to a mix
    steps = [
        np.flatnonzero(row)[np.argsort(cost[row], kind="stable")] for row, cost in zip(possible, costs, strict=True)
    ]

    def at(levels: Sequence[int]) -> Choices:
        return np.array(
            [own[min(level, len(own) - 1)] for own, level in zip(steps, levels, strict=True)], dtype=np.intp
        )

    def fits(levels: Sequence[int]) -> bool:
        return problem.totals(at(levels))["size"] <= size

    uniform = [[level] * len(steps) for level in range(max(map(len, steps))) if fits([level] * len(steps))]
    if not uniform:
        return None
    levels = uniform[-1]
    for group in order:
        changed = [*levels]
        changed[group] += 1
        levels = changed if fits(changed) else levels
    return at(levels)
