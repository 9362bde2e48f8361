"""Conformance tests of searches: inherit `SearchConformance` in a test class, and set `search`.

class TestMine(SearchConformance):
    search = staticmethod(my_search)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.layer import Layer
from mpq.core.problem import Problem, build_problem
from mpq.core.table import SensitivityTable

SCHEMES = ("int2-g64", "int4-g64", "int8-channel", "bf16")


def small_problem(seed: int = 0, layers: int = 5, *, share: float | None = 0.5) -> Problem:
    """A problem small enough to enumerate: the first two layers tied, one pinned, one scheme forbidden.

    Args:
        seed: of the shapes and losses.
        layers: at least four.
        share: position of the size budget between the smallest and the largest allocation; None for no budget.
    """
    random = np.random.default_rng(seed)
    drawn = tuple(
        Layer(f"layer{i}", "linear", int(random.integers(1, 9)) * 16, 64, macs=1000, tie="pair" if i < 2 else "")
        for i in range(layers)
    )
    scores = 4.0 ** -np.arange(len(SCHEMES)) * random.lognormal(0, 1, (layers, len(SCHEMES)))
    table = SensitivityTable(drawn, SCHEMES, scores, 0.1 * scores, "made", {"overhead": 64})
    problem = build_problem(table, pin={"layer2": "int8-channel"}, forbid={"layer3": "bf16"})
    if share is None:
        return problem
    sizes = np.where(np.isfinite(problem.losses), problem.costs["size"], np.nan)
    low, high = np.nanmin(sizes, 1).sum(), np.nanmax(sizes, 1).sum()
    return replace(problem, budgets={"size": float(low + share * (high - low))})


class SearchConformance:
    """The contract of a search; each test is named after a requirement."""

    search: ClassVar[Callable[..., Frontier]]
    options: ClassVar[Mapping[str, Any]] = {}  # options that the search needs
    optimal: ClassVar[bool] = False  # whether the last point must have the least predicted loss within the budget

    def found(self, problem: Problem) -> Frontier:
        """The search's frontier."""
        return type(self).search(problem, **self.options)

    def test_budgets_are_kept(self) -> None:
        for seed, share in product(range(3), (0.0, 0.3, 1.0)):
            problem = small_problem(seed, share=share)
            for choices in self.found(problem).choices:
                assert problem.totals(choices)["size"] <= problem.budgets["size"] * (1 + 1e-9)

    def test_ties_pins_and_forbidden_schemes_are_kept(self) -> None:
        for allocation in self.found(small_problem()):
            assert allocation.schemes[0] == allocation.schemes[1]
            assert allocation.scheme_of["layer2"].name == "int8-channel"
            assert allocation.scheme_of["layer3"].name != "bf16"
            assert allocation.overhead == 64

    def test_costs_are_those_of_the_choices(self) -> None:
        problem = small_problem(1)
        frontier = self.found(problem)
        for index, choices in enumerate(frontier.choices):
            assert np.isclose(frontier.costs[index], problem.totals(choices)[frontier.cost], rtol=1e-12)
            assert frontier.allocation(index).size == problem.totals(choices)["size"]

    def test_the_same_problem_gives_the_same_answer(self) -> None:
        first, second = self.found(small_problem(2)), self.found(small_problem(2))
        assert first.costs.tolist() == second.costs.tolist()
        assert [list(one) for one in first.choices] == [list(one) for one in second.choices]

    def test_the_problem_is_left_as_it_came(self) -> None:
        problem = small_problem(3)
        losses, sizes = problem.losses.copy(), problem.costs["size"].copy()
        self.found(problem)
        assert np.array_equal(problem.losses, losses)
        assert np.array_equal(problem.costs["size"], sizes)

    def test_an_unreachable_budget_is_reported(self) -> None:
        message = ""
        try:
            self.found(replace(small_problem(), budgets={"size": 1.0}))
        except MpqError as error:
            message = str(error)
        assert "smallest" in message, "expected MpqError with the reachable range for a budget that no allocation meets"

    def test_a_claimed_optimum_is_one(self) -> None:
        if not self.optimal:
            return
        for seed in range(5):
            problem = small_problem(seed, share=0.4)
            options = [np.flatnonzero(np.isfinite(row)) for row in problem.losses]
            rows = np.arange(len(problem.groups))
            every = np.array(list(product(*options)))
            within = problem.costs["size"][rows, every].sum(1) <= problem.budgets["size"]
            best = problem.losses[rows, every].sum(1)[within].min()
            assert np.isclose(self.found(problem).losses[-1], best, rtol=1e-6)
