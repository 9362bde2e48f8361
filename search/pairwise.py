"""The optimum when pairs of layers interact (CLADO): a quadratic program, linearized exactly for HiGHS."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.interactions import Interactions
from mpq.core.problem import Array, Problem
from mpq.search.integer import OBJECTIVE_RANGE, check_budgets

ROUNDING = 1e-9  # relative slack by which limits are tightened against the solver's tolerance


def pairwise(
    problem: Problem, *, interactions: Interactions, cost: str = "size", time_limit: float | None = None
) -> Frontier:
    """The allocation of least loss, interactions counted, that meets every budget, as a frontier of one point.

    Every product of two binary choices becomes a variable y between 0 and 1. Over the choices of either group the y of
    a pair of groups sum to the other's choice (first-level reformulation-linearization, Adams and Sherali 1986), which
    fixes y where the choices are whole, and bounds the optimum far better than y >= x + x' - 1.

    Args:
        problem: its ties, restrictions, costs and budgets; its losses only say what is forbidden.
        interactions: losses of single layers and of pairs, for the problem's layers and schemes, in any order.
        cost: the cost of the frontier's point.
        time_limit: seconds; the best found by then is returned, with the proven gap in the frontier's `gap`.

    Raises:
        MpqError: interactions of other layers or schemes, budgets that cannot be met, or no solution in time.
    """
    check_budgets(problem)
    losses, pairs = group_interactions(problem, interactions)
    rows, columns = np.nonzero(np.isfinite(losses))
    singles = losses[rows, columns]
    number = len(rows)
    couplings, products = _couplings(rows, pairs[rows[:, None], columns[:, None], rows, columns])
    values = pairs[rows[products[0]], columns[products[0]], rows[products[1]], columns[products[1]]]
    objective = np.concatenate([singles, values])
    scale = OBJECTIVE_RANGE / (float(np.ptp(objective)) or 1.0)
    one_each = csr_array((np.ones(number), (rows, np.arange(number))), (len(losses), len(objective)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(values):
        constraints.append(LinearConstraint(couplings, 0, 0))
    for name, budget in problem.budgets.items():
        total = np.concatenate([problem.costs[name][rows, columns], np.zeros(len(values))])
        unit = float(np.abs(total).max()) or 1.0
        constraints.append(LinearConstraint(total / unit, -np.inf, budget / unit * (1 + ROUNDING)))
    options = {"mip_rel_gap": 0.0, **({"time_limit": time_limit} if time_limit else {})}
    integrality = np.concatenate([np.ones(number), np.zeros(len(values))])
    answer = milp(
        objective * scale, integrality=integrality, bounds=Bounds(0, 1), constraints=constraints, options=options
    )
    if answer.x is None:
        if "time limit" in answer.message.lower():
            raise MpqError("the quadratic program found no solution within the time limit: raise it")
        raise MpqError(f"the budgets of {' and '.join(problem.budgets)} cannot be met together: raise one of them")
    picked = np.full(losses.shape, -1.0)
    picked[rows, columns] = answer.x[:number]
    choices = picked.argmax(1)
    totals = problem.totals(choices)
    for name, budget in problem.budgets.items():
        if totals[name] > budget * (1 + ROUNDING):
            raise MpqError(
                f"the solver's solution exceeds the budget of {name} by its tolerance: lower the budget slightly"
            )
    loss = total_loss(losses, pairs, choices)
    gap = 0.0 if answer.status == 0 else abs(loss - answer.mip_dual_bound / scale) / max(abs(loss), 1e-300)
    described = replace(problem, losses=losses, metric="interactions")
    return Frontier(described, np.array([totals[cost]]), np.array([loss]), [choices], cost, gap)


def group_interactions(problem: Problem, interactions: Interactions) -> tuple[Array, Array]:
    """Losses (groups, schemes), inf where forbidden, and pairs (groups, schemes, groups, schemes) of the groups.

    Interactions of layers within a group count as the group's own loss. The pairs' diagonal blocks are zero.
    """
    for what, expected, known in (
        ("layer", [layer.name for layer in problem.layers], interactions.layers),
        ("scheme", problem.schemes, interactions.schemes),
    ):
        for name in expected:
            if name not in known:
                raise MpqError(f"the interactions lack the {what} {name}: measure them for this problem's {what}s")
    layers = [interactions.layers.index(layer.name) for layer in problem.layers]
    schemes = [interactions.schemes.index(scheme) for scheme in problem.schemes]
    member = np.zeros((len(problem.groups), len(layers)))
    for group, members in enumerate(problem.groups):
        member[group, list(members)] = 1
    singles = member @ interactions.losses[np.ix_(layers, schemes)]
    pairs = np.einsum("gi,iajb,hj->gahb", member, interactions.pairs[np.ix_(layers, schemes, layers, schemes)], member)
    groups, options = np.arange(len(problem.groups)), np.arange(len(schemes))
    within = pairs[groups[:, None], options, groups[:, None], options] / 2  # every pair was counted twice
    pairs[groups, :, groups, :] = 0.0
    return np.where(np.isfinite(problem.losses), singles + within, np.inf), pairs


def total_loss(losses: Array, pairs: Array, choices: NDArray[np.intp]) -> float:
    """Loss of one scheme index per group, interactions counted."""
    groups = np.arange(len(losses))
    coupled = pairs[groups[:, None], choices[:, None], groups, choices]
    return float(losses[groups, choices].sum() + coupled.sum() / 2)


def _couplings(rows: NDArray[np.intp], values: Array) -> tuple[csr_array, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Constraints over (choices, products), and the two choices of each product.

    Pairs of groups that do not interact need no products. For a product's pair of groups, and a choice of either:
    the sum of its products minus the choice is zero.
    """
    number = len(rows)
    coupled = np.zeros((rows.max() + 1, rows.max() + 1), dtype=bool)
    np.logical_or.at(coupled, (rows[:, None], rows[None, :]), values != 0)
    first, second = np.nonzero(np.triu(coupled, 1)[rows[:, None], rows[None, :]])
    products = np.arange(len(first))
    blocks = []
    for choice, other in ((first, second), (second, first)):
        keys, constraint = np.unique(choice * number + rows[other], return_inverse=True)
        sums = csr_array((np.ones(len(products)), (constraint, number + products)), (len(keys), number + len(products)))
        minus = csr_array((-np.ones(len(keys)), (np.arange(len(keys)), keys // number)), sums.shape)
        blocks.append(sums + minus)
    return vstack(blocks, format="csr"), (first, second)
