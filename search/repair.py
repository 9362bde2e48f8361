"""The likeliest choices of a policy within a cost."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.core.errors import MpqError

Array = NDArray[np.float64]
IMPOSSIBLE = -1e6  # log-probabilities below are of options that a decision does not have


def likeliest_within(log_probabilities: Array, costs: Array, budget: float) -> NDArray[np.intp]:
    """One option for each decision, (decisions,): the likeliest together whose costs sum to the budget at most.

    The likeliest options themselves where they fit; else an integer program, solved exactly.

    Args:
        log_probabilities: (decisions, options).
        costs: (decisions, options).
        budget: of the sum.

    Raises:
        MpqError: the cheapest options cost more than the budget.
    """
    rows = np.arange(len(costs))
    likeliest: NDArray[np.intp] = log_probabilities.argmax(1)
    if costs[rows, likeliest].sum() <= budget:
        return likeliest
    cheapest: NDArray[np.intp] = costs.argmin(1)
    if costs[rows, cheapest].sum() > budget:
        raise MpqError(f"a cost of {budget:.6g} is below the cheapest choice, {costs[rows, cheapest].sum():.6g}")
    decisions, options = costs.shape
    one_each = csr_array((np.ones(costs.size), (np.repeat(rows, options), np.arange(costs.size))))
    unit, limit = float(np.abs(costs).max()), budget
    for _ in range(5):  # the solver keeps the budget to a tolerance only
        found = milp(
            (log_probabilities.max(1, keepdims=True) - log_probabilities).ravel(), integrality=np.ones(costs.size),
            bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0},
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(costs.reshape(1, -1) / unit), -np.inf, limit / unit),
            ],
        )  # fmt: skip
        if found.x is None:
            return cheapest
        chosen: NDArray[np.intp] = found.x.reshape(decisions, options).argmax(1)
        excess = costs[rows, chosen].sum() - budget
        if excess <= 0:
            return chosen
        limit -= 2 * excess
    return cheapest


def likely_within(
    log_probabilities: Array, cost: Callable[[NDArray[np.intp]], float], budget: float
) -> NDArray[np.intp]:
    """As `likeliest_within`, for costs that are no sum over decisions, by single switches.

    While the cost is too high, the switch that loses the least log-probability for the cost it saves is made; then
    every switch back to a likelier option that still fits.

    Raises:
        MpqError: no switches lead to the budget.
    """
    choices: NDArray[np.intp] = log_probabilities.argmax(1)
    present = cost(choices)
    while present > budget:
        best: tuple[float, int, int, float] | None = None
        for decision, option in np.argwhere(log_probabilities > IMPOSSIBLE).tolist():
            other = _with(choices, decision, option)
            saved = present - (price := cost(other))
            if saved > 0:
                lost = log_probabilities[decision, choices[decision]] - log_probabilities[decision, option]
                candidate = (lost / saved, decision, option, price)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            raise MpqError(f"a cost of {budget:.6g} is below the cheapest choice that switches lead to, {present:.6g}")
        choices, present = _with(choices, best[1], best[2]), best[3]
    for decision in range(len(choices)):
        for option in np.argsort(-log_probabilities[decision]).tolist():
            if option == choices[decision]:
                break
            if cost(other := _with(choices, decision, option)) <= budget:
                choices = other
                break
    return choices


def _with(choices: NDArray[np.intp], decision: int, option: int) -> NDArray[np.intp]:
    changed = choices.copy()
    changed[decision] = option
    return changed
