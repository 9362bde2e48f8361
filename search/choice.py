"""`mpq.allocate`: the best allocation of a table under a budget."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.latency import LatencyTable
from mpq.core.live_activations import ACTIVATIONS, LiveActivations
from mpq.core.prediction import predicts_loss
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable
from mpq.search import SEARCHES, frontier_of
from mpq.search.budgets import Budgets


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
    activations: LiveActivations | None = None,
    batch: int = 1,
    whole_frontier: bool = False,
    **options: Any,
) -> Choice:
    """The best allocation of a table under a budget, and the frontier that it is on.

    Args:
        table: predicted losses.
        bits: maximum average of stored bits per weight, or
        size: maximum bytes of the model, or text as "500MB", or
        loss: maximum predicted loss increase, for the smallest model, or
        memory: maximum bytes of weights, keys and values together, or text as "6GB"; alone or with bits or size.
        context: tokens of each of `batch` texts that memory and kv_bits count.
        kv_bits: maximum average of stored bits of a cached element, with another budget.
        budgets: further largest totals by cost ("bitops", "latency", "activations").
        search: a name of `mpq.search.SEARCHES`; left out, exact, integer with further budgets, cheapest with `loss`.
        pin: scheme by layer pattern.
        forbid: scheme patterns by layer pattern.
        ties: whether layers that serving kernels fuse share a scheme.
        latencies: measured seconds of layers, and of attention to the context: adds the cost "latency".
        activations: what is live in a pass of the model (`mpq.network.live_activations`): for a budget of that name.
        batch: tokens at a time, for `latencies`; texts that are cached at once, for `memory`.
        whole_frontier: for a search on measured loss: lower loss and size together.
        options: further arguments of the search, such as evolution's `evaluate` and `trials`.

    Raises:
        MpqError: incompatible budgets and search, or what the search refuses.
    """
    given = sum(budget is not None for budget in (bits, size, loss))
    if given > 1 or (not given and memory is None) or (loss is not None and (memory or kv_bits)):
        raise MpqError("give one budget: bits, size, loss or memory; memory goes with bits or size too")
    cached = memory is not None or kv_bits is not None
    table = table if cached else table.weights()
    numbers = {name: float(limit) for name, limit in (budgets or {}).items()}
    if ACTIVATIONS in numbers:
        if activations is None:
            raise MpqError("a budget of activations needs the model: give live_activations of it")
        activations.check(numbers[ACTIVATIONS], table.layers, table.schemes)
    further = Budgets(numbers, latencies, activations, batch, context if cached else 0).of(table)
    if cached:
        return _with_cache(
            table, bits, size, memory, kv_bits, context, batch, pin=pin, forbid=forbid, ties=ties, **further
        )
    search = search or ("cheapest" if loss is not None else "integer" if budgets else "exact")
    check_choice(search, loss is not None, bool(budgets), whole_frontier)
    limits = further["budgets"]
    request: dict[str, Any] = {
        "search": search, "pin": pin, "forbid": forbid, "ties": ties, **further, **options,
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
        raise MpqError("memory and kv_bits need the number of cached tokens: give e.g. context=32768")
    if memory is not None and not predicts_loss(table.metric):
        raise MpqError(
            f"the metric {table.metric} does not score a cache: use one that predicts losses, such as kl-curvature"
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


def check_choice(search: str, by_loss: bool, by_budgets: bool, whole_frontier: bool) -> None:
    """MpqError when a search does not support the requested budgets; needs no table."""
    entry = SEARCHES.named(search)
    if search == "cheapest" and not by_loss:
        raise MpqError("the search cheapest needs a loss: give loss instead of bits or size")
    if search != "cheapest" and by_loss:
        raise MpqError(f"the search {search} has no budget of predicted loss: leave the search out")
    if whole_frontier and (not entry.measures or by_budgets):
        raise MpqError("a measured frontier needs a search on measured loss (evolution), and no other budget")
