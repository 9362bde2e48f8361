"""What a job settles before it profiles: layers, formats, limits and serving, or a refusal."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpq.core.allocation import Allocation
from mpq.core.cache import parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.core.frontier import BITS_PER_BYTE, Frontier
from mpq.core.latency import LatencyTable
from mpq.core.layer import Layer
from mpq.core.live_activations import ACTIVATIONS, LiveActivations
from mpq.core.registry import Target
from mpq.core.scheme import Scheme
from mpq.core.sizes import parse_size
from mpq.exporters.holding import warn_about_versions
from mpq.exporters.targets import formats_of
from mpq.exporting import sizer_for
from mpq.feasible import Wanted, held_layers, own_format, without_kernels
from mpq.memory import Serving, candidates, check_memory, live_in, serving_of
from mpq.search import frontier_of
from mpq.search.budgets import Budgets, check_budgets, check_latencies
from mpq.sensitivity import METRICS
from mpq.smallest import check_limit
from mpq.sources import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of the model: `bits` a weight and bytes of its file, the KL divergence alone, and other costs."""

    bits: float | None
    size: float | None
    max_kl: float | None
    budgets: Budgets

    def most(self, weights: int) -> float | None:
        """The limit in bytes of this many weights, or of the file; None without a limit."""
        return self.size if self.bits is None else self.bits * weights / BITS_PER_BYTE

    def beside(self, cache: CacheFormats, serving: Serving) -> "Limits":
        """The limits that remain for the weights beside a cache."""
        if serving.memory is None:
            return self
        left = serving.memory - cache.nbytes(serving.context, serving.batch)
        return replace(self, size=min(self.size or math.inf, left))

    def hold(self, sized: Callable[[Allocation], int], allocation: Allocation) -> bool:
        """Whether an allocation's file and other costs are within them."""
        return self.budgets.keep(allocation) and (self.size is None or sized(allocation) <= self.size)


@dataclass(frozen=True)
class Plan:
    """A job before its profile: every request is known to be possible by the model's structure."""

    target: Target
    layers: tuple[Layer, ...]
    formats: Sequence[str]  # candidates of the weights
    cached: tuple[str, ...]  # candidates of keys and values; empty without a budget for them
    granularity: str
    limits: Limits
    sized: Callable[[Allocation], int]  # bytes of the target's file
    serving: Serving | None  # None without a budget of memory or cache
    live: LiveActivations | None  # None if they cannot be counted


def planned(
    source: Source,
    target: Target,
    wanted: Wanted,
    budgets: Mapping[str, float],
    latencies: LatencyTable | None,
    granularity: str | None,
) -> Plan:
    """Check a request against model, target and measured latencies, and fill in its defaults.

    Raises:
        MpqError: a request that cannot be met, with the nearest that can.
    """
    if wanted.max_kl is not None:
        check_limit(wanted.max_kl, source.kind)
    check_budgets(budgets, latencies, wanted.max_kl is not None)
    warn_about_versions(target)
    granularity = _granularity(granularity, source, target, wanted.metric, latencies)
    serving = serving_of(source, wanted.memory, wanted.kv_bits, wanted.context, wanted.batch)
    entries, cached = (
        candidates(source, target, wanted.table, wanted.kv_formats, wanted.metric) if serving else ((), ())
    )
    if target.name == "mpq":
        for sentence in without_kernels(wanted.formats or (), wanted.kv_formats or (), entries):
            log.warning(sentence)
    layers, held = held_layers(source.model, target, wanted)
    sized = sizer_for(target, source)
    size = None if wanted.size is None else parse_size(wanted.size)
    if size is not None:  # bytes of the file, with header and vocabulary
        unranked = frontier_of(held.table, pin=wanted.pin, forbid=held.forbid, ties=wanted.ties or held.fuses)
        layer_budget(unranked, sized, wanted.bits, size)
    formats, bits = wanted.formats, wanted.bits
    if wanted.keeps_weights:
        formats, bits = own_format(source.model)
    if formats is None:
        formats = formats_of(target, granularity)
    if serving:
        check_memory(serving, entries, cached, held.least(pin=wanted.pin, ties=wanted.ties))
    context = 0 if serving is None else serving.context
    if latencies is not None and "latency" in budgets:
        named = [*formats, *(Scheme(parse_cache_format(name), cached=True).name for name in cached)]
        check_latencies(latencies, (*layers, *entries), named, wanted.batch, context)
    live = live_in(source, layers, wanted.batch, wanted.context, budgets.get(ACTIVATIONS), formats)
    limits = Limits(bits, size, wanted.max_kl, Budgets(budgets, latencies, live, wanted.batch, context))
    return Plan(target, layers, formats, cached, granularity, limits, sized, serving, live)


def layer_budget(
    frontier: Frontier, sized: Callable[[Allocation], int], bits: float | None, size: float | None
) -> float:
    """Maximum bytes of the layers; a size also includes the other tensors and the file's header.

    Raises:
        MpqError: a budget out of reach.
    """
    most = math.inf
    if bits is not None:
        frontier.index_at(bits=bits)
        most = bits * frontier.problem.weights / BITS_PER_BYTE
    if size is None:
        return most
    budget = size
    while (excess := sized(frontier.at(size=budget)) - size) > 0:
        budget -= excess
    return min(budget - frontier.problem.overhead, most)


def _granularity(asked: str | None, source: Source, target: Target, metric: str, latencies: LatencyTable | None) -> str:
    """The requested granularity if the target supports it; the default of `quantize_model` without a request."""
    if asked is None:
        timed = latencies is None or latencies.has_mixes
        by_rows = source.kind == "perplexity" and target.mixes and bool(METRICS.named(metric).rows) and timed
        return "row" if by_rows else "layer"
    if asked == "row" and not target.mixes:
        log.warning("%s supports one format per layer: granularity 'layer' is used", target.name)
        return "layer"
    return asked
