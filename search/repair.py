"""The likeliest choices of a policy within a cost."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.core.errors import MpqError

Array = NDArray[np.float64]


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
