"""Problems small enough to enumerate, and their enumeration."""

from itertools import product

import numpy as np

from mpq.core.frontier import non_dominated
from mpq.core.layer import Layer
from mpq.core.problem import Problem, build_problem
from mpq.core.table import SensitivityTable

SCHEMES = ("int2-g64", "int3-g128", "int4-channel", "fp8-e4m3", "bf16")


def make_table(seed: int, layers: int = 5, schemes: tuple[str, ...] = SCHEMES, tie: bool = False) -> SensitivityTable:
    """Layers of random shapes whose losses roughly fall with bits; optionally the first two are tied."""
    random = np.random.default_rng(seed)
    found = tuple(
        Layer(
            f"layer{i}", "linear", int(random.integers(1, 9)) * 16, int(random.integers(1, 5)) * 64,
            macs=int(random.integers(1, 1000)), tie="pair" if tie and i < 2 else "",
        )
        for i in range(layers)
    )  # fmt: skip
    scores = 4.0 ** -np.arange(len(schemes)) * random.lognormal(0, 1.5, (layers, len(schemes)))
    return SensitivityTable(found, schemes, scores, 0.1 * scores, "made", {"overhead": 100})


def make_problem(seed: int, layers: int = 5, **options) -> Problem:
    """The problem of `make_table`; seeds divisible by three forbid a few choices."""
    table = make_table(seed, layers)
    if seed % 3 == 0:
        table.scores[np.random.default_rng(seed).random(table.scores.shape) < 0.2] = np.nan
        table.scores[:, 2] = np.nan_to_num(table.scores[:, 2], nan=1.0)
    return build_problem(table, **options)


def every_choice(problem: Problem) -> np.ndarray:
    """All allowed choices, (number, groups)."""
    return np.array(list(product(*(np.flatnonzero(np.isfinite(row)) for row in problem.losses))))


def brute_force(problem: Problem, cost: str = "size") -> tuple[np.ndarray, np.ndarray]:
    """Costs and losses of the frontier within the budgets, by enumeration."""
    choices = every_choice(problem)
    rows = np.arange(len(problem.groups))
    met = np.ones(len(choices), dtype=bool)
    for name, budget in problem.budgets.items():
        met &= problem.costs[name][rows, choices].sum(1) <= budget
    costs = problem.costs[cost][rows, choices].sum(1)[met]
    losses = problem.losses[rows, choices].sum(1)[met]
    kept = non_dominated(costs, losses)
    return costs[kept], losses[kept]
