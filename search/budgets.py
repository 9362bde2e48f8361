"""Budgets of other costs than bytes of weights and cache: "bitops", "latency" and "activations"."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.latency import LatencyTable
from mpq.core.layer import Layer
from mpq.core.live_activations import ACTIVATIONS, LiveActivations
from mpq.core.problem import Array
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.table import SensitivityTable


@dataclass(frozen=True)
class Budgets:
    """Largest totals by cost, and what was measured to count them."""

    limits: Mapping[str, float] = field(default_factory=dict)  # operations, seconds, bytes
    latencies: LatencyTable | None = None
    activations: LiveActivations | None = None
    batch: int = 1  # tokens at a time, or texts
    context: int = 0  # tokens whose attention counts in "latency"

    def __bool__(self) -> bool:
        return bool(self.limits)

    def of(self, table: SensitivityTable) -> dict[str, Any]:
        """`costs` of a table's layers beside bytes and bit operations, and `budgets`, as `build_problem` takes them."""
        costs: dict[str, Array] = {}
        limits = {name: limit for name, limit in self.limits.items() if name != ACTIVATIONS}
        if self.latencies is not None:
            costs["latency"] = latency_cost(table, self.latencies, self.batch, self.context)
        if self.activations is not None and ACTIVATIONS in self.limits:
            bound = self.activations.constraints(table.layers, table.schemes, self.limits[ACTIVATIONS])
            for index, (cost, limit) in enumerate(bound):
                costs[f"{ACTIVATIONS} {index}"], limits[f"{ACTIVATIONS} {index}"] = cost, limit
        return {"costs": costs, "budgets": limits}

    def beside(self, table: SensitivityTable, cache: CacheFormats | None) -> dict[str, Any]:
        """What a cache leaves of them to the weights of a table, as `of`."""
        arguments = self.of(table)
        if self.latencies is not None and "latency" in self.limits:
            arguments["budgets"]["latency"] -= cache_seconds(cache, self.latencies, self.batch, self.context)
        return arguments

    def keep(self, allocation: Allocation) -> bool:
        """Whether an allocation is within them, attention to a context counted."""
        totals = {"bitops": allocation.bitops}
        if self.latencies is not None:
            seconds = self.latencies.cost(self.batch, self.context)
            weights = sum(seconds(layer, allocation.scheme_of[layer.name]) for layer in allocation.layers)
            totals["latency"] = weights + cache_seconds(allocation.cache, self.latencies, self.batch, self.context)
        if self.activations is not None:
            totals[ACTIVATIONS] = self.activations.peak(allocation.scheme_of)
        return all(totals[name] <= limit for name, limit in self.limits.items())


def check_budgets(budgets: Mapping[str, float], latencies: LatencyTable | None, by_divergence: bool) -> None:
    """MpqError for a budget of an unknown cost, or beside a limit of the divergence."""
    known = ["bitops", ACTIVATIONS, *(["latency"] if latencies is not None else [])]
    for name, limit in budgets.items():
        if name == "latency" and latencies is None:
            raise MpqError("a budget of latency needs measured seconds: give a table written by 'mpq bench -o'")
        if name not in known:
            raise MpqError(f"unknown cost {name!r} of a budget: expected one of {', '.join(known)}")
        if not math.isfinite(limit) or limit < 0:
            raise MpqError(f"invalid budget {name}={limit}: expected a finite number of at least 0")
    if budgets and by_divergence:
        raise MpqError("a limit of the divergence excludes other budgets: leave them out")


def check_latencies(
    latencies: LatencyTable, layers: Iterable[Layer], schemes: Iterable[str], batch: int = 1, context: int = 0
) -> None:
    """MpqError when the seconds of a scheme, of layers or of keys and values, were not measured."""
    seconds, parsed = latencies.cost(batch, context), [parse_scheme(name) for name in schemes]
    for layer in layers:
        for scheme in parsed:
            if scheme.cached == layer.is_cached:
                seconds(layer, scheme)


def cache_seconds(cache: CacheFormats | None, latencies: LatencyTable, batch: int = 1, context: int = 0) -> float:
    """Measured seconds of one token's attention; 0 where none was measured or nothing is cached."""
    seconds, formats = latencies.cost(batch, context), {} if cache is None else cache.format_of
    entries = () if cache is None else cache.entries
    return sum(seconds(entry, Scheme(formats[entry.name], cached=True)) for entry in entries)


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
