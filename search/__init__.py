"""Searches: a problem in, a frontier of allocations out; one search, one file. Plugins add searches through the
entry-point group "mpq.searches".
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mpq.core.errors import MpqError, nearest_names
from mpq.core.frontier import Frontier
from mpq.core.problem import Array, build_problem
from mpq.core.table import SensitivityTable

DEFAULT_SEARCH = "exact"

# name: (module:function, what it is); functions take a Problem and options, and give a Frontier.
SEARCHES: dict[str, tuple[str, str]] = {
    "exact": ("mpq.search.exact:exact", "the whole frontier in one cost, proven (core knapsack algorithm)"),
    "integer": ("mpq.search.integer:integer", "the optimum under several budgets, by HiGHS (HAWQ-V3)"),
    "cheapest": ("mpq.search.surface:cheapest", "the smallest of at most a predicted loss, by HiGHS"),
    "monotone": ("mpq.search.monotone:monotone", "less sensitive layers never get more bits (HAWQ-V2)"),
    "quadratic": ("mpq.search.quadratic:quadratic", "the optimum when pairs of layers interact (CLADO), by HiGHS"),
    "evolution": ("mpq.search.evolution:evolution", "measured loss: level switches (EvoPress), NSGA-II/III, by Optuna"),
}


def frontier_of(
    table: SensitivityTable,
    *,
    search: str = DEFAULT_SEARCH,
    pin: Mapping[str, str] | None = None,
    forbid: Mapping[str, str | Iterable[str]] | None = None,
    ties: bool = True,
    costs: Mapping[str, Array] | None = None,
    budgets: Mapping[str, float | str] | None = None,
    **options: Any,
) -> Frontier:
    """The allocations that a table makes best: `mpq.frontier`.

    Args:
        table: predicted losses.
        search: a name of SEARCHES or of a plugin; `options` are its own.
        pin: scheme by layer pattern.
        forbid: scheme patterns by layer pattern.
        ties: whether layers that serving kernels fuse share a scheme.
        costs: further costs, name -> (layers, schemes).
        budgets: largest totals by cost name ("size", "bitops"), for searches that keep several.

    Raises:
        MpqError: what `mpq.core.problem.build_problem` and the search refuse.
    """
    problem = build_problem(table, pin=pin, forbid=forbid, ties=ties, costs=costs, budgets=budgets)
    return search_named(search)(problem, **options)


def search_named(name: str) -> Callable[..., Frontier]:
    """The search called `name`, ours or a plugin's; MpqError with the known names when there is none."""
    plugins = {entry.name: entry for entry in entry_points(group="mpq.searches")}
    if name in SEARCHES:
        module, _, function = SEARCHES[name][0].partition(":")
        search: Callable[..., Frontier] = getattr(import_module(module), function)
        return search
    if name in plugins:
        plugin: Callable[..., Frontier] = plugins[name].load()
        return plugin
    raise MpqError(f"unknown search {name!r}: {nearest_names(name, [*SEARCHES, *plugins])}")


def __getattr__(name: str) -> object:
    """`OneShot` and `Schedule`, which need torch, are imported when they are asked for."""
    homes = {"OneShot": "mpq.search.one_shot", "Schedule": "mpq.search.controller"}
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
