"""The likeliest choices of a policy within a cost."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.core.errors import MpqError

Array = NDArray[np.float64]
FLOORS = (0.97, 0.9, 0.0)  # shares of the budget that choices should use, tried in this order
IMPOSSIBLE = -1e6  # lower log-probabilities mark options that a decision does not have


def likeliest_within(log_probabilities: Array, costs: Array, budget: float) -> NDArray[np.intp]:
    """One option for each decision, (decisions,): the likeliest together that use the budget and do not exceed it.

    The likeliest options if they use 97 to 100 % of the budget; else the exact solution of an integer program over
    choices that use at least 97 %, else 90 %, else any share.

    Args:
        log_probabilities: (decisions, options).
        costs: (decisions, options).
        budget: of the sum.

    Raises:
        MpqError: the cheapest options cost more than the budget.
    """
    rows = np.arange(len(costs))
    likeliest: NDArray[np.intp] = log_probabilities.argmax(1)
    if FLOORS[0] * budget <= costs[rows, likeliest].sum() <= budget:
        return likeliest
    cheapest: NDArray[np.intp] = costs.argmin(1)
    if costs[rows, cheapest].sum() > budget:
        raise MpqError(f"a cost of {budget:.6g} is below the cheapest choice, {costs[rows, cheapest].sum():.6g}")
    for floor in FLOORS:
        solution = _solved(log_probabilities, costs, budget, floor)
        if solution is not None:
            return solution
    return cheapest


def _solved(log_probabilities: Array, costs: Array, budget: float, floor: float) -> NDArray[np.intp] | None:
    """The likeliest choices that cost from `floor` of the budget to the budget, None where there are none."""
    decisions, options = costs.shape
    rows, unit, limit = np.arange(decisions), float(np.abs(costs).max()), budget
    one_each = csr_array((np.ones(costs.size), (np.repeat(rows, options), np.arange(costs.size))))
    for _ in range(5):  # the solver keeps the budget only to a tolerance
        solution = milp(
            (log_probabilities.max(1, keepdims=True) - log_probabilities).ravel(), integrality=np.ones(costs.size),
            bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0},
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(costs.reshape(1, -1) / unit), floor * budget / unit, limit / unit),
            ],
        )  # fmt: skip
        if solution.x is None:
            return None
        chosen: NDArray[np.intp] = solution.x.reshape(decisions, options).argmax(1)
        excess = costs[rows, chosen].sum() - budget
        if excess <= 0:
            return chosen
        limit -= 2 * excess
    return None


def likely_within(
    log_probabilities: Array, cost: Callable[[NDArray[np.intp]], float], budget: float
) -> NDArray[np.intp]:
    """As `likeliest_within`, for costs that are no sum over decisions, by single switches.

    While the cost is too high, the switch that loses the least log-probability for the cost it saves is made; then,
    while less than 97 % of the budget is used, the one that loses the least for the cost it adds and still fits.

    Raises:
        MpqError: no switches lead to the budget.
    """
    choices: NDArray[np.intp] = log_probabilities.argmax(1)
    present = cost(choices)
    while not FLOORS[0] * budget <= present <= budget:
        better = _switched(log_probabilities, choices, cost, present, budget)
        if better is None and present > budget:
            raise MpqError(f"a cost of {budget:.6g} is below the cheapest choice that was found, {present:.6g}")
        if better is None:
            break
        choices, present = better
    return choices


def _switched(
    log_probabilities: Array, choices: NDArray[np.intp], cost: Callable[[NDArray[np.intp]], float], present: float,
    budget: float,
) -> tuple[NDArray[np.intp], float] | None:  # fmt: skip
    """The choices after the switch that loses the least log-probability for the cost it moves, and what they cost."""
    best: tuple[float, int, int, float] | None = None
    for decision, option in np.argwhere(log_probabilities > IMPOSSIBLE).tolist():
        price = cost(_with(choices, decision, option))
        moved = present - price if present > budget else price - present
        if moved > 0 and (present > budget or price <= budget):
            lost = log_probabilities[decision, choices[decision]] - log_probabilities[decision, option]
            candidate = (lost / moved, decision, option, price)
            best = candidate if best is None else min(best, candidate)
    return None if best is None else (_with(choices, best[1], best[2]), best[3])


def _with(choices: NDArray[np.intp], decision: int, option: int) -> NDArray[np.intp]:
    changed = choices.copy()
    changed[decision] = option
    return changed
