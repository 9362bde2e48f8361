"""One optimal allocation under any number of budgets: the integer program of HAWQ-V3, solved by HiGHS through scipy."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import Array, Problem

OBJECTIVE_RANGE = 1e4  # losses are scaled to this: HiGHS stops at absolute gaps of 1e-6
TIGHTENINGS = 5


def integer(problem: Problem, *, cost: str = "size", time_limit: float | None = None) -> Frontier:
    """The allocation of least predicted loss that meets every budget of the problem, as a frontier of one point.

    Minimizes the sum of losses over one choice per group, subject to a linear constraint for each budget
    (HAWQ-V3, arXiv 2011.10680, section 3.3).

    Args:
        problem: with budgets on any of its costs.
        cost: the cost of the frontier's point.
        time_limit: seconds; the best found by then is returned, with its proven gap.

    Raises:
        MpqError: a budget that nothing meets, budgets that only together cannot be met, or no solution in time.
    """
    check_budgets(problem)
    rows, columns = np.nonzero(np.isfinite(problem.losses))
    losses = problem.losses[rows, columns]
    loss_range = float(np.ptp(losses))
    objective = (losses - losses.min()) / (loss_range or 1.0) * OBJECTIVE_RANGE
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    limits = dict(problem.budgets)
    for _ in range(TIGHTENINGS):
        constraints = [LinearConstraint(one_each, 1, 1), *_constraints(problem, limits, rows, columns)]
        answer = milp(
            objective, integrality=np.ones(len(rows)), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": 0.0, **({"time_limit": time_limit} if time_limit else {})},
        )  # fmt: skip
        if answer.x is None:
            _explain(problem, answer.message)
        choices = _choices(problem, answer.x, rows, columns)
        totals = problem.totals(choices)
        over = {name: totals[name] - budget for name, budget in problem.budgets.items() if totals[name] > budget}
        if not over:
            return _one_point(problem, choices, cost, answer.mip_gap if answer.status else 0.0)
        for name, excess in over.items():  # solvers keep constraints to a tolerance, we keep budgets
            limits[name] -= 2 * excess
    raise MpqError("the solver's solution exceeds a budget by its tolerance: raise a budget slightly")


def check_budgets(problem: Problem) -> None:
    """MpqError naming a budget that is below what the cheapest choices cost, or no budget at all."""
    if not problem.budgets:
        raise MpqError("no budget: the integer program needs at least one, such as size")
    possible = np.isfinite(problem.losses)
    for name, budget in problem.budgets.items():
        smallest = float(np.where(possible, problem.costs[name], np.inf).min(1).sum())
        if budget < smallest:
            raise MpqError(f"a budget of {budget:.15g} {name} is below the smallest allocation, {smallest:.15g}")


def _constraints(
    problem: Problem, limits: Mapping[str, float], rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> list[LinearConstraint]:
    constraints = []
    for name, limit in limits.items():
        cost = problem.costs[name][rows, columns]
        unit = _unit(cost)
        constraints.append(LinearConstraint(csr_array(cost / unit).reshape(1, -1), -np.inf, limit / unit))
    return constraints


def _unit(cost: Array) -> float:
    """The costs' common divisor when they are whole numbers, else their largest."""
    if (cost == np.rint(cost)).all() and cost.any():
        return float(math.gcd(*cost.astype(np.int64).tolist()))
    return float(np.abs(cost).max()) or 1.0


def _choices(problem: Problem, solution: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.intp]:
    picked = np.full(problem.losses.shape, -1.0)
    picked[rows, columns] = solution
    choices: NDArray[np.intp] = picked.argmax(1)
    return choices


def _one_point(problem: Problem, choices: NDArray[np.intp], cost: str, gap: float) -> Frontier:
    loss = float(problem.losses[np.arange(len(choices)), choices].sum())
    return Frontier(problem, np.array([problem.totals(choices)[cost]]), np.array([loss]), [choices], cost, gap)


def _explain(problem: Problem, message: str) -> None:
    if "time limit" in message.lower():
        raise MpqError("the integer program found no solution within the time limit: raise it")
    raise MpqError(f"the budgets of {' and '.join(conflicting(problem))} cannot be met together: raise one of them")


def conflicting(problem: Problem) -> tuple[str, ...]:
    """A smallest set of budgets that cannot be met together: without any one of them the others can."""
    budgets = dict(problem.budgets)
    for name in problem.budgets:
        others = {other: budget for other, budget in budgets.items() if other != name}
        if others and not _feasible(problem, others):
            budgets = others
    return tuple(budgets)


def _feasible(problem: Problem, budgets: Mapping[str, float]) -> bool:
    rows, columns = np.nonzero(np.isfinite(problem.losses))
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    constraints = [LinearConstraint(one_each, 1, 1), *_constraints(problem, budgets, rows, columns)]
    answer = milp(np.zeros(len(rows)), integrality=np.ones(len(rows)), bounds=Bounds(0, 1), constraints=constraints)
    return answer.x is not None
