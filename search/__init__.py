"""Searches, one a file: each turns a problem into a frontier of allocations. Plugins add searches through the
entry-point group "mpq.searches".
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import Array, build_problem
from mpq.core.registry import Registry, Search
from mpq.core.table import SensitivityTable

DEFAULT_SEARCH = "exact"
NEEDED = {
    "interactions": "measure and save them with mpq.sensitivity.interactions; on the command line --interactions FILE",
    "evaluate": "a function that measures the loss of an allocation",
    "loss": "the largest predicted loss increase",
}

# Functions take a Problem and options, and give a Frontier.
SEARCHES: Registry[Search] = Registry(
    Search,
    "search",
    "mpq.searches",
    [
        Search("exact", "mpq.search.exact:exact", "the whole frontier in one cost, proven (core knapsack algorithm)"),
        Search("integer", "mpq.search.integer:integer", "the optimum under several budgets, by HiGHS (HAWQ-V3)"),
        Search("cheapest", "mpq.search.surface:cheapest", "the smallest of at most a predicted loss, by HiGHS"),
        Search("monotone", "mpq.search.monotone:monotone", "less sensitive layers never get more bits (HAWQ-V2)"),
        Search(
            "pairwise", "mpq.search.pairwise:pairwise", "the optimum when pairs of layers interact (CLADO), by HiGHS"
        ),
        Search(
            "evolution",
            "mpq.search.evolution:evolution",
            "measured loss: level switches (EvoPress), NSGA-II/III, by Optuna",
            measures=True,
        ),
    ],
    former={"quadratic": "pairwise"},  # also the name of a metric
)


def frontier_of(
    table: SensitivityTable,
    *,
    search: str = DEFAULT_SEARCH,
    pin: Mapping[str, str] | None = None,
    forbid: Mapping[str, str | Iterable[str]] | None = None,
    ties: bool = True,
    costs: Mapping[str, Array] | None = None,
    budgets: Mapping[str, float | str] | None = None,
    context: int = 0,
    batch: int = 1,
    cache: CacheFormats | None = None,
    **options: Any,
) -> Frontier:
    """Pareto frontier of predicted loss against cost: `mpq.frontier`.

    Args:
        table: predicted losses.
        search: a name of SEARCHES or of a plugin; `options` are its own.
        pin: scheme by layer pattern.
        forbid: scheme patterns by layer pattern.
        ties: whether layers that serving kernels fuse share a scheme.
        costs: further costs, name -> (layers, schemes).
        budgets: largest totals by cost name ("size", "bitops"), for searches that keep several.
        context: tokens to cache of each of `batch` texts: keys and values are chosen too, and "cache" and "memory" are
            further costs, in bytes.
        cache: formats of keys and values for all allocations, where they are not chosen here.

    Raises:
        MpqError: what `mpq.core.problem.build_problem` and the search refuse.
    """
    problem = build_problem(
        table,
        pin=pin,
        forbid=forbid,
        ties=ties,
        costs=costs,
        budgets=budgets,
        context=context,
        batch=batch,
        cache=cache,
    )
    function = search_named(search)
    known = signature(function).parameters.values()
    required = [one.name for one in known if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    missing = [name for name in required if name not in options]
    if missing:
        raise MpqError(f"the search {search} also needs {' and '.join(missing)}: {NEEDED.get(missing[0], 'give it')}")
    return function(problem, **options)


def search_named(name: str) -> Callable[..., Frontier]:
    """The search of this name, built in or a plugin's; MpqError with the known names otherwise."""
    return SEARCHES.named(name).load()


def __getattr__(name: str) -> object:
    """Import `OneShot` and `Schedule`, which need torch, at first use."""
    homes = {"OneShot": "mpq.search.one_shot", "Schedule": "mpq.search.controller"}
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
