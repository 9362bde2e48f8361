"""Weights and key-value cache within one memory budget, and the search of formats for both."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.cache import CACHE_FORMATS, EVERY, cache_name, head_bytes, parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError, NotFiniteError
from mpq.core.layer import Layer
from mpq.core.live_activations import LiveActivations
from mpq.core.prediction import predicts_loss
from mpq.core.problem import Problem, build_problem
from mpq.core.registry import Target
from mpq.core.scheme import parse_scheme
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable
from mpq.exporters.caches import KINDS, LAYERS
from mpq.exporters.holding import Held
from mpq.exporters.mpq import checkpoint
from mpq.measuring import Measurer
from mpq.network.cached import context_of, find_cached
from mpq.network.calibration import take, tensors_in
from mpq.network.live_activations import live_activations
from mpq.network.samples import SAMPLES_FIRST, arrangement
from mpq.search import frontier_of
from mpq.search.budgets import Budgets
from mpq.search.exact import exact
from mpq.search.integer import integer
from mpq.sources import Source

DOUBTS = (1.0, 0.5, 2.0)  # factors of all scores of the cache beside those of the weights: other splits to measure


@dataclass(frozen=True)
class Serving:
    """Serving conditions: `batch` texts of `context` tokens, within a memory or a cache of limited bits.

    Raises:
        MpqError: an invalid budget.
    """

    context: int
    batch: int = 1
    memory: float | None = None  # bytes of weights and cache together
    kv_bits: float | None = None  # largest average of stored bits of a cached number

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise MpqError(
                f"invalid context {self.context} or batch {self.batch}: expected at least one token and text"
            )
        if self.kv_bits is not None and not 0 < self.kv_bits < math.inf:
            raise MpqError(f"invalid kv_bits {self.kv_bits}: expected a positive number, such as 4.5")

    def least(self, entries: Sequence[Layer], formats: Sequence[str]) -> int:
        """Bytes of the smallest cache."""
        return sum(
            min(CacheFormats((entry,), (name,)).nbytes(self.context, self.batch) for name in formats)
            for entry in entries
        )


def serving_of(
    source: Source, memory: float | str | None, kv_bits: float | None, context: int | None, batch: int
) -> Serving | None:
    """The requested memory and cache; None without a request.

    Raises:
        MpqError: a memory without a context, or a context beyond the model's.
    """
    longest = context_of(source.model)
    if context is not None and longest is not None and context > longest:
        raise MpqError(f"{source.name} takes texts of at most {longest:,} tokens, not {context:,}: lower the context")
    if memory is None and kv_bits is None:
        if context is not None and source.kind != "perplexity":
            raise MpqError(f"a context counts tokens of texts, which {source.name} does not take: leave it out")
        Serving(1 if context is None else context, batch)  # refused as everywhere
        return None
    if context is None:
        if memory is not None:
            raise MpqError("a memory budget includes the cache: give the context in tokens, e.g. context=32768")
        context = longest or 4096
    return Serving(context, batch, None if memory is None else parse_size(memory), kv_bits)


def live_in(
    source: Source, layers: Sequence[Layer], batch: int, context: int | None, limit: float | None,
    formats: Sequence[str] = (),
) -> LiveActivations | None:  # fmt: skip
    """The live activations of the source's model, within reach of a limit of bytes where there is one.

    None where they cannot be counted and nothing limits them. Without a context, texts are as long as a sample.

    Raises:
        MpqError: a limit that no formats keep to, or of what cannot be counted.
    """
    texts = source.kind == "perplexity"
    sample = take(source.calibration[0], slice(0, 1))
    tokens = (context or tensors_in(sample)[0].shape[-1]) if texts else 0
    try:
        if not texts and arrangement(source.model, source.calibration, source.loss_fn) != SAMPLES_FIRST:
            raise MpqError("activations are counted of samples along the first dimension alone: leave out their budget")
        live = live_activations(source.model, layers, sample, source.loss_fn, batch, tokens)
    except MpqError:
        if limit is not None:
            raise
        return None
    if limit is not None:
        live.check(limit, layers, formats)
    return live


def candidates(
    source: Source, target: Target, table: SensitivityTable | None, names: Sequence[str] | None, metric: str = ""
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Keys and values of the source's model, and the formats that they may have; those of a table made before.

    Raises:
        MpqError: a model without a cache, a table without keys and values, or formats that the target does not serve.
    """
    entries = find_cached(source.model, take(source.calibration[0], slice(0, 1)), source.loss_fn)
    if not target.caches:
        raise MpqError(f"{target.name} files cannot store cache formats: leave out memory and kv_bits")
    served = CACHE_FORMATS if target.caches == EVERY else target.caches
    for name in names or ():
        format = parse_cache_format(name)
        if target.caches != EVERY and format not in map(parse_cache_format, served):
            raise MpqError(
                f"{target.name} does not support the cache format {name}: expected one of {', '.join(served)}"
            )
    if not predicts_loss(metric if table is None else table.metric):
        raise MpqError(
            f"the metric {metric} does not score a cache: use one that predicts losses, such as kl-curvature"
        )
    if table is None:
        return entries, tuple(names or served)
    if not table.entries:
        raise MpqError("the table has no keys and values: profile again with cache formats (--kv-formats)")
    cached = (scheme for scheme in map(parse_scheme, table.schemes) if scheme.cached)
    return table.entries, tuple(cache_name(scheme.weight) for scheme in cached)


def check_memory(serving: Serving, entries: Sequence[Layer], formats: Sequence[str], least_weights: float) -> None:
    """MpqError when not even the smallest formats of weights and cache are within the budgets."""
    least = serving.least(entries, formats)
    if serving.memory is not None and least_weights + least > serving.memory:
        smallest = min(formats, key=lambda name: head_bytes(parse_cache_format(name), entries[0].cols))
        room = max(serving.memory - least_weights, 0.0)
        fits = CacheFormats.uniform(tuple(entries), smallest).tokens_in(room, serving.batch)
        advice = f"a context of {fits:,} tokens fits" if fits > 0 else "raise it or add smaller formats"
        raise MpqError(
            f"a memory of {serving.memory:,.0f} bytes is too small: the smallest formats take {least_weights:,.0f} of "
            f"weights and {least:,.0f} of cache at {serving.context:,} tokens: {advice}"
        )
    bits = 8 * least / _numbers(serving, entries)
    if serving.kv_bits is not None and serving.kv_bits < bits * (1 - 1e-9):
        raise MpqError(f"a cache of {serving.kv_bits:g} bits is below the smallest formats, {bits:.4g} bits: raise it")


def _numbers(serving: Serving, entries: Sequence[Layer]) -> int:
    return serving.batch * sum(entry.params * entry.tokens(serving.context) for entry in entries)


@dataclass(frozen=True)
class Request:
    """Conditions of the choice of a cache, beside the table."""

    model: nn.Module  # its other tensors count as memory
    serving: Serving
    target: Target  # some serve one format for all keys, and one for all values
    pin: Mapping[str, str] | None = None
    ties: bool = True  # whether fused layers share a scheme
    weights: float | None = None  # bytes that the layers' weights may take, where they have a budget of their own
    budgets: Budgets = field(default_factory=Budgets)  # budgets of other costs


def splits(held: Held, request: Request) -> list[CacheFormats]:
    """Caches that the budgets are best spent on by prediction: were scores right, half or twice as large; each once.

    Raises:
        MpqError: budgets that cannot be met.
    """
    entries = held.table.entries
    if request.target.caches_alike == LAYERS:
        held = replace(held, table=_tied(held.table))
    joint_problem(held, request)  # raises MpqError for pins that match nothing
    caches: dict[CacheFormats, None] = {}
    doubts = DOUBTS if request.serving.memory is not None else DOUBTS[:1]
    for doubt in doubts:
        scaled = replace(held, table=_scaled(held.table, doubt))
        best: Allocation | None = None
        for forbid in _forbidden(held.table, request.target):
            one = _optimum(replace(scaled, forbid={**held.forbid, **forbid}), request)
            if one is not None and (best is None or one.loss < best.loss):
                best = one
        if best is not None and best.cache is not None:
            caches[CacheFormats(entries, best.cache.names)] = None
    if not caches:
        raise MpqError("no formats of weights and cache are within all budgets: raise one of them")
    return list(caches)


def choose_cache(held: Held, request: Request, measurer: Measurer, measured: bool = True) -> CacheFormats:
    """The cache of `splits` with the least harm on calibration data, with weights for the remaining memory.

    Args:
        held: the table restricted to what the target supports.
        request: budgets, model and target.
        measurer: of the model.
        measured: whether to measure; otherwise the first is taken.

    Raises:
        MpqError: budgets that cannot be met.
    """
    caches = splits(held, request)
    if len(caches) == 1 or not measured:
        return caches[0]
    harms = [_harm(weights_within(held, request, cache), measurer) for cache in caches]
    return caches[int(np.argmin(harms))]


def weights_within(held: Held, request: Request, cache: CacheFormats) -> Allocation:
    """The predicted optimum of the weights beside a cache."""
    frontier = frontier_of(
        held.table, pin=request.pin, forbid=held.forbid, ties=request.ties or held.fuses, cache=cache
    )
    budget = float(frontier.costs[-1]) if request.weights is None else request.weights
    serving = request.serving
    if serving.memory is not None:
        room = serving.memory - cache.nbytes(serving.context, serving.batch)
        allocation = frontier.allocation(0)
        budget = min(budget, room - checkpoint.file_size(request.model, allocation) + allocation.size)
    budget = max(min(budget, float(frontier.costs[-1])), float(frontier.costs[0]))
    if not request.budgets:
        return frontier.at(cost=budget)
    table = held.table.weights()
    further = request.budgets.beside(table, cache)
    return frontier_of(
        table, search="integer", pin=request.pin, forbid=held.forbid, ties=request.ties or held.fuses, cache=cache,
        costs=further["costs"], budgets={**further["budgets"], "size": budget},
    ).allocation(0)  # fmt: skip


def _harm(allocation: Allocation, measurer: Measurer) -> float:
    try:
        quality = measurer.quality(allocation, "search")
    except NotFiniteError:
        return math.inf
    return float(np.average(quality.harm, weights=quality.weights))


def _tied(table: SensitivityTable) -> SensitivityTable:
    """The table with keys and values of each layer tied."""
    layers = (replace(one, tie=one.name.rpartition(".")[0]) if one.is_cached else one for one in table.layers)
    return replace(table, layers=tuple(layers))


def _scaled(table: SensitivityTable, factor: float) -> SensitivityTable:
    factors = np.array([factor if layer.is_cached else 1.0 for layer in table.layers])[:, None]
    return replace(table, scores=table.scores * factors, errors=table.errors * factors)


def _forbidden(table: SensitivityTable, target: Target) -> Iterator[dict[str, tuple[str, ...]]]:
    """Schemes to forbid for keys and values, for each choice of a shared format; nothing if they need not share one."""
    names = [name for name in table.schemes if parse_scheme(name).cached]
    if target.caches_alike != KINDS:
        yield {}
        return
    for keys, values in product(names, names):
        yield {
            "cache.*.keys": tuple(name for name in names if name != keys),
            "cache.*.values": tuple(name for name in names if name != values),
        }


def joint_problem(held: Held, request: Request, budgets: Mapping[str, float] | None = None) -> Problem:
    """Weights and cache as one problem."""
    serving, further = request.serving, request.budgets.of(held.table)
    return build_problem(
        held.table, pin=request.pin, forbid=held.forbid, ties=request.ties or held.fuses, costs=further["costs"],
        budgets={**further["budgets"], **budgets} if budgets else None, context=serving.context, batch=serving.batch,
    )  # fmt: skip


def _optimum(held: Held, request: Request) -> Allocation | None:
    """The optimum within all budgets, a file's header counted; None where they cannot be met."""
    serving = request.serving
    others: dict[str, float] = {}
    if request.weights is not None:
        others["size"] = request.weights
    if serving.kv_bits is not None:
        others["cache"] = serving.kv_bits * _numbers(serving, held.table.entries) / 8
    memory = math.inf if serving.memory is None else serving.memory
    room = memory - int(held.table.provenance.get("overhead", 0))
    try:
        frontier = None if others or request.budgets else exact(joint_problem(held, request), cost="memory")
        while True:
            if frontier is not None:
                allocation = frontier.at(cost=min(room, float(frontier.costs[-1])))
            else:
                within = {**others, **({"memory": room} if math.isfinite(room) else {})}
                allocation = integer(joint_problem(held, request, within), cost="memory").allocation(0)
            assert allocation.cache is not None
            cached = allocation.cache.nbytes(serving.context, serving.batch)
            excess = checkpoint.file_size(request.model, allocation) + cached - memory
            if excess <= 0:
                return allocation
            room -= excess
    except MpqError:
        return None
