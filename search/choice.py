"""Choice of an allocation from a table and a budget: `mpq.allocate`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.latency import LatencyTable
from mpq.core.layer import Layer
from mpq.core.prediction import predicts_loss
from mpq.core.problem import Array
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable
from mpq.search import SEARCHES, frontier_of


@dataclass(frozen=True)
class Choice:
    """A frontier and the allocation taken from it."""

    frontier: Frontier
    allocation: Allocation


def allocate(
    table: SensitivityTable,
    *,
    bits: float | None = None,
    size: float | str | None = None,
    loss: float | None = None,
    memory: float | str | None = None,
    context: int = 0,
    kv_bits: float | None = None,
    budgets: Mapping[str, float | str] | None = None,
    search: str | None = None,
    pin: Mapping[str, str] | None = None,
    forbid: Mapping[str, str | Iterable[str]] | None = None,
    ties: bool = True,
    latencies: LatencyTable | None = None,
    batch: int = 1,
    whole_frontier: bool = False,
    **options: Any,
) -> Choice:
    """The best allocation of a table under a budget, and the frontier that it is on.

    Args:
        table: predicted losses.
        bits: largest average of stored bits per weight, or
        size: largest number of bytes of the model, or text as "500MB", or
        loss: largest predicted loss increase, for the smallest model, or
        memory: largest bytes of weights and of keys and values together, or text as "6GB"; bits or size may join.
        context: tokens of each of `batch` texts that memory and kv_bits count.
        kv_bits: largest average of stored bits of a cached number, beside another budget.
        budgets: further largest totals by cost ("bitops", "latency").
        search: a name of `mpq.search.SEARCHES`; left out, exact, integer with further budgets, cheapest with `loss`.
        pin: scheme by layer pattern.
        forbid: scheme patterns by layer pattern.
        ties: whether layers that serving kernels fuse share a scheme.
        latencies: measured seconds of layers, and of attention to the context: adds the cost "latency".
        batch: tokens at a time, for `latencies`; texts that are cached at once, for `memory`.
        whole_frontier: for a search on measured loss: lower loss and size together.
        options: the search's own, such as evolution's `evaluate` and `trials`.

    Raises:
        MpqError: incompatible budgets and search, or what the search refuses.
    """
    given = sum(budget is not None for budget in (bits, size, loss))
    if given > 1 or (not given and memory is None) or (loss is not None and (memory or kv_bits)):
        raise MpqError("name one budget: bits, size or loss; or memory, which bits or size may join")
    if memory is not None or kv_bits is not None:
        return _with_cache(
            table, bits, size, memory, kv_bits, context, batch,
            pin=pin, forbid=forbid, ties=ties, budgets=dict(budgets or {}),
            costs=costs_of(table, latencies, batch, context),
        )  # fmt: skip
    table = table.weights()
    search = search or ("cheapest" if loss is not None else "integer" if budgets else "exact")
    check_choice(search, loss is not None, bool(budgets), whole_frontier)
    costs = costs_of(table, latencies, batch)
    limits: dict[str, float | str] = dict(budgets or {})
    request: dict[str, Any] = {
        "search": search, "pin": pin, "forbid": forbid, "ties": ties, "costs": costs, "budgets": limits, **options,
    }  # fmt: skip
    if search == "cheapest":
        frontier = frontier_of(table, **request, loss=loss)
        return Choice(frontier, frontier.allocation(0))
    nbytes = parse_size(size) if size is not None else None
    if search == "exact" or whole_frontier:
        frontier = frontier_of(table, **request)
        return Choice(frontier, frontier.at(bits=bits, size=nbytes))
    weights = sum(layer.params for layer in table.layers)
    limits["size"] = bits * weights / 8 if bits is not None else (nbytes or 0) - table.provenance.get("overhead", 0)
    frontier = frontier_of(table, **request)
    return Choice(frontier, frontier.allocation(len(frontier) - 1))


def _with_cache(
    table: SensitivityTable, bits: float | None, size: float | str | None, memory: float | str | None,
    kv_bits: float | None, context: int, batch: int, **request: Any,
) -> Choice:  # fmt: skip
    """Weights and cache as one problem: its frontier in memory, or with more budgets the optimum."""
    if not table.entries:
        raise MpqError("the table has no keys and values: profile again with cache formats (--kv-formats)")
    if context < 1:
        raise MpqError("memory and kv_bits count cached tokens: name the context, such as context=32768")
    if memory is not None and not predicts_loss(table.metric):
        raise MpqError(
            f"scores of {table.metric} rank weights alone: memory needs losses, as of the metric kl-curvature"
        )
    overhead = float(table.provenance.get("overhead", 0))
    limits: dict[str, float] = request.pop("budgets")
    if size is not None:
        limits["size"] = parse_size(size) - overhead
    if bits is not None:
        limits["size"] = bits * sum(layer.params for layer in table.weights().layers) / 8
    if kv_bits is not None:
        limits["cache"] = kv_bits * batch * sum(one.params * one.tokens(context) for one in table.entries) / 8
    if memory is not None and not limits:
        frontier = frontier_of(table, search="exact", cost="memory", context=context, batch=batch, **request)
        return Choice(frontier, frontier.at(cost=parse_size(memory) - overhead))
    if memory is not None:
        limits["memory"] = parse_size(memory) - overhead
    frontier = frontier_of(table, search="integer", budgets=limits, context=context, batch=batch, **request)
    return Choice(frontier, frontier.allocation(0))


def check_budgets(budgets: Mapping[str, float], latencies: LatencyTable | None, by_divergence: bool) -> None:
    """MpqError for a budget of a cost that is not known, or beside a limit of the divergence."""
    known = ["bitops", *(["latency"] if latencies is not None else [])]
    for name, limit in budgets.items():
        if name == "latency" and latencies is None:
            raise MpqError("a budget of latency needs measured seconds: write them with 'mpq bench -o' and give them")
        if name not in known:
            raise MpqError(f"unknown cost {name!r} of a budget: expected one of {', '.join(known)}")
        if not math.isfinite(limit) or limit < 0:
            raise MpqError(f"invalid budget {name}={limit}: expected a finite number of at least 0")
    if budgets and by_divergence:
        raise MpqError("a limit of the divergence finds the smallest model alone: leave out the other budgets")


def check_latencies(
    latencies: LatencyTable, layers: Iterable[Layer], schemes: Iterable[str], batch: int = 1, context: int = 0
) -> None:
    """MpqError when the seconds of a scheme, of layers or of keys and values, were not measured."""
    seconds, parsed = latencies.cost(batch, context), [parse_scheme(name) for name in schemes]
    for layer in layers:
        for scheme in parsed:
            if scheme.cached == layer.is_cached:
                seconds(layer, scheme)


def keeps(
    allocation: Allocation,
    budgets: Mapping[str, float],
    latencies: LatencyTable | None = None,
    batch: int = 1,
    context: int = 0,
) -> bool:
    """Whether an allocation is within budgets of "bitops" and "latency", attention to a context counted."""
    totals = {"bitops": allocation.bitops}
    if latencies is not None:
        seconds = latencies.cost(batch, context)
        weights = sum(seconds(layer, allocation.scheme_of[layer.name]) for layer in allocation.layers)
        totals["latency"] = weights + cache_seconds(allocation.cache, latencies, batch, context)
    return all(totals[name] <= limit for name, limit in budgets.items())


def cache_seconds(cache: CacheFormats | None, latencies: LatencyTable, batch: int = 1, context: int = 0) -> float:
    """Measured seconds of one token's attention; 0 where none was measured or nothing is cached."""
    seconds, formats = latencies.cost(batch, context), {} if cache is None else cache.format_of
    entries = () if cache is None else cache.entries
    return sum(seconds(entry, Scheme(formats[entry.name], cached=True)) for entry in entries)


def beside_cache(
    budgets: Mapping[str, float], cache: CacheFormats | None, latencies: LatencyTable | None, batch: int, context: int
) -> dict[str, float]:
    """What a cache leaves of budgets to the weights."""
    if latencies is None or "latency" not in budgets:
        return dict(budgets)
    return {**budgets, "latency": budgets["latency"] - cache_seconds(cache, latencies, batch, context)}


def costs_of(table: SensitivityTable, latencies: LatencyTable | None, batch: int, context: int = 0) -> dict[str, Array]:
    """Costs of a table's layers beside their bytes and bit operations, name -> (layers, schemes)."""
    return {"latency": latency_cost(table, latencies, batch, context)} if latencies is not None else {}


def check_choice(search: str, by_loss: bool, by_budgets: bool, whole_frontier: bool) -> None:
    """MpqError when a search does not support the requested budgets; needs no table."""
    entry = SEARCHES.named(search)
    if search == "cheapest" and not by_loss:
        raise MpqError("search cheapest finds the smallest model of a loss: give loss instead of bits or size")
    if search != "cheapest" and by_loss:
        raise MpqError(f"a predicted loss is no budget of the search {search}: leave the search out")
    if whole_frontier and (not entry.measures or by_budgets):
        raise MpqError("a measured frontier needs a search on measured loss (evolution), and no other budget")


def latency_cost(table: SensitivityTable, latencies: LatencyTable, batch: int = 1, context: int = 0) -> Array:
    """Seconds of every layer in every scheme, (layers, schemes); MpqError when one was not measured.

    Keys and values count as `LatencyTable.cost` says.
    """
    seconds = latencies.cost(batch, context)
    schemes = [parse_scheme(name) for name in table.schemes]
    return np.array(
        [
            [seconds(layer, scheme) if scheme.cached == layer.is_cached else 0.0 for scheme in schemes]
            for layer in table.layers
        ]
    )
