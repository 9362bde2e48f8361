"""The problem that every search solves: a table with costs, ties and restrictions as plain arrays."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.allocation import Allocation
from mpq.core.cache import cache_name
from mpq.core.cache_formats import CacheFormats
from mpq.core.costs import bitops, cache_bytes, file_bytes
from mpq.core.errors import MpqError, expect
from mpq.core.evidence import supported
from mpq.core.layer import Layer
from mpq.core.patterns import match_names
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable

Array = NDArray[np.float64]
Choices = NDArray[np.intp]  # (groups,), a scheme's index for each
BYTES = ("size", "cache", "memory")  # costs in bytes


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one scheme for each group of layers; losses and costs are additive.

    A group is a tie of layers that share a scheme, or a single layer. Forbidden choices have loss inf.

    >>> layers = (Layer("a", "linear", 8, 8), Layer("b", "linear", 8, 8))
    >>> table = SensitivityTable(layers, ("int4-channel", "int8-channel"), [[2., 1.], [4., 1.]], np.zeros((2, 2)), "x")
    >>> build_problem(table).allocation([0, 1]).loss
    3.0
    """

    layers: tuple[Layer, ...]
    schemes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # indices of layers; every layer in exactly one group
    losses: Array  # (groups, schemes), predicted loss increase; inf where forbidden
    variances: Array  # (groups, schemes), squared standard errors
    costs: Mapping[str, Array]  # name -> (groups, schemes), finite; "size" in bytes is always there
    budgets: Mapping[str, float] = field(default_factory=dict)  # largest total of a cost
    metric: str = ""
    overhead: int = 0  # bytes that no scheme changes
    provenance: Mapping[str, Any] = field(default_factory=dict)
    assignments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # the table's, by layer and mix
    cache: CacheFormats | None = None  # fixed formats of keys and values, not searched
    cache_loss: tuple[float, float] = (0.0, 0.0)  # what they add to every prediction, and its variance

    @classmethod
    def from_table(cls, table: SensitivityTable, **restrictions: Any) -> "Problem":
        """The problem of a table, with the restrictions (pin, forbid, ties, costs, budgets) of `build_problem`."""
        return build_problem(table, **restrictions)

    @property
    def weights(self) -> int:
        """Number of weights in all layers."""
        return sum(layer.params for layer in self.layers if not layer.is_cached)

    def group_name(self, group: int) -> str:
        """The name of the tie or of the single layer."""
        first = self.layers[self.groups[group][0]]
        return first.tie if len(self.groups[group]) > 1 else first.name

    def totals(self, choices: Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, float]:
        """Total of every cost for one scheme index per group."""
        picked = np.arange(len(self.groups)), np.asarray(choices, dtype=np.intp)
        return {name: float(cost[picked].sum()) for name, cost in self.costs.items()}

    def allocation(self, choices: Sequence[int] | NDArray[np.integer[Any]]) -> Allocation:
        """The allocation of one scheme index per group.

        Raises:
            MpqError: a forbidden choice (group named).
        """
        choices = np.asarray(choices, dtype=np.intp)
        for group in np.flatnonzero(~np.isfinite(self.losses[np.arange(len(self.groups)), choices])).tolist():
            raise MpqError(
                f"scheme {self.schemes[choices[group]]} is forbidden for {self.group_name(group)}: choose another"
            )
        by_layer = {
            layer: self.schemes[choice] for group, choice in zip(self.groups, choices, strict=True) for layer in group
        }
        pairs = [(layer, by_layer[index]) for index, layer in enumerate(self.layers)]
        entries = {layer: cache_name(parse_scheme(scheme).weight) for layer, scheme in pairs if layer.is_cached}
        weights = {layer: scheme for layer, scheme in pairs if not layer.is_cached}
        row_formats = {layer.name: self.assignments.get(layer.name, {}).get(scheme, "") for layer, scheme in pairs}
        return Allocation(
            tuple(weights), tuple(weights.values()), *self.prediction(choices), self.metric, self.overhead,
            self.provenance, {name: assignment for name, assignment in row_formats.items() if assignment},
            CacheFormats(tuple(entries), tuple(entries.values())) if entries else self.cache,
        )  # fmt: skip

    def prediction(self, choices: NDArray[np.integer[Any]]) -> tuple[float, float]:
        """Predicted loss increase of one scheme index per group, and its standard error."""
        picked = np.arange(len(self.groups)), choices
        loss, variance = self.cache_loss
        return float(self.losses[picked].sum()) + loss, float(np.sqrt(self.variances[picked].sum() + variance))

    def uniform(self) -> tuple[tuple[str, Allocation], ...]:
        """Uniform allocations, (name, allocation), for the formats that every group can take; mixes are none.

        With keys and values, one format for all weights and one for the cache: every pair of them.
        """
        cached = np.array([self.layers[group[0]].is_cached for group in self.groups])

        def possible(groups: NDArray[np.bool_]) -> list[int]:
            fits = np.flatnonzero(np.isfinite(self.losses[groups]).all(0)).tolist()
            return [j for j in fits if not self.is_mix(j)]

        if not cached.any():
            return tuple((self.schemes[j], self.allocation([j] * len(self.groups))) for j in possible(~cached))
        pairs = ((j, k) for j in possible(~cached) for k in possible(cached))
        return tuple(
            (f"{self.schemes[j]} + {self.schemes[k]}", self.allocation(np.where(cached, k, j))) for j, k in pairs
        )

    def is_mix(self, scheme: int) -> bool:
        """Whether the scheme of this index is a mix."""
        return parse_scheme(self.schemes[scheme]).mix is not None


def build_problem(
    table: SensitivityTable,
    *,
    pin: Mapping[str, str] | None = None,
    forbid: Mapping[str, str | Iterable[str]] | None = None,
    ties: bool = True,
    costs: Mapping[str, Array] | None = None,
    budgets: Mapping[str, float | str] | None = None,
    context: int = 0,
    batch: int = 1,
    cache: CacheFormats | None = None,
) -> Problem:
    """Build the problem of a table.

    Args:
        table: losses of every layer and scheme; a NaN forbids the scheme. Layers in the table's `reasons` get the
            median score of their kind (`mpq.core.evidence`), which the provenance records.
        pin: scheme by layer pattern; matching layers take no other. The scheme must be in the table.
        forbid: patterns of schemes that layers must not take, by layer pattern.
        ties: whether tied layers (q/k/v, gate/up) share a scheme.
        costs: further costs beside "size" and "bitops", name -> (layers, schemes).
        budgets: largest totals by cost name, for every allocation; "size" may be text as "500MB".
        context: tokens to cache of each of `batch` texts. Where there are some, the table's keys and values are part of
            the problem, with the costs "cache" in bytes and "memory", that and "size"; otherwise they are left out.
        cache: formats of keys and values for all allocations, where these are left out.

    Raises:
        MpqError: a pattern without a match, an unknown cost, a group with no scheme left (named), or a layer without
            scores when no layer of its kind has any.
    """
    expect(table, SensitivityTable, "a SensitivityTable, as mpq.profile gives it")
    expect(pin or {}, Mapping, "pins as a mapping from layer patterns to formats")
    pins = _pins(table, pin or {}, bool(context))
    cache_loss, every = _cache_loss(table, cache), [layer.name for layer in table.layers]
    if not context:
        table = table.weights()
    scores, errors, assumed = supported(table, {name for name, _ in pins})
    losses = np.where(np.isnan(scores) | _forbidden(table, every, pins, forbid or {}), np.inf, scores)
    by_layer = _costs(table, costs or {}, context, batch)
    groups = _groups(table.layers, ties)
    problem = Problem(
        table.layers, table.schemes, groups, _summed(losses, groups), _summed(errors**2, groups),
        {name: _summed(np.asarray(cost, dtype=np.float64), groups) for name, cost in by_layer.items()},
        _limits(budgets or {}, by_layer), table.metric, int(table.provenance.get("overhead", 0)),
        {**table.provenance, **assumed}, table.assignments, cache, cache_loss,
    )  # fmt: skip
    for group in np.flatnonzero(~np.isfinite(problem.losses).any(1)).tolist():
        raise MpqError(
            f"no scheme is left for {problem.group_name(group)}: pin its layers alike, or pin and forbid less"
        )
    return problem


def _pins(table: SensitivityTable, pin: Mapping[str, str], cached: bool) -> list[tuple[str, Scheme]]:
    """Pairs of a layer and the scheme that it is pinned to; keys and values only if `cached`."""
    pins = []
    for pattern, text in pin.items():
        scheme = parse_scheme(text)
        if scheme.name not in table.schemes:
            raise MpqError(f"cannot pin {pattern} to {scheme.name}: the table has {', '.join(table.schemes)}")
        if cached or not scheme.cached:
            alike = [layer.name for layer in table.layers if layer.is_cached == scheme.cached]
            pins += [(name, scheme) for name in match_names(pattern, alike)]
    return pins


def _forbidden(
    table: SensitivityTable,
    every: Sequence[str],
    pins: Iterable[tuple[str, Scheme]],
    forbid: Mapping[str, str | Iterable[str]],
) -> NDArray[np.bool_]:
    """Mask (layers, schemes) of what pins and forbidden schemes exclude; patterns match `every` layer's name."""
    row = {layer.name: i for i, layer in enumerate(table.layers)}
    mask = np.zeros((len(table.layers), len(table.schemes)), dtype=bool)
    for name, scheme in pins:
        mask[row[name]] |= [other != scheme.name for other in table.schemes]
    for pattern, schemes in forbid.items():
        rows = [row[name] for name in match_names(pattern, every) if name in row]
        if rows:
            columns = [table.schemes.index(scheme) for scheme in match_names(schemes, table.schemes, "scheme")]
            mask[np.ix_(rows, columns)] = True
    return mask


def _costs(table: SensitivityTable, further: Mapping[str, Array], context: int, batch: int) -> dict[str, Array]:
    """Costs (layers, schemes) by name."""
    schemes = [parse_scheme(scheme) for scheme in table.schemes]
    costs = {
        "size": _cost(table.layers, schemes, file_bytes),
        "bitops": _cost(table.layers, schemes, lambda layer, scheme: bitops(scheme, layer.macs)),
        **further,
    }
    if context:
        costs["cache"] = _cost(table.layers, schemes, lambda one, scheme: cache_bytes(one, scheme, context, batch))
        costs["memory"] = costs["size"] + costs["cache"]
    return costs


def _limits(budgets: Mapping[str, float | str], costs: Iterable[str]) -> dict[str, float]:
    """Budgets as numbers; MpqError for an unknown cost or an invalid limit."""
    known = tuple(costs)
    for name in budgets:
        if name not in known:
            raise MpqError(f"unknown cost {name!r} of a budget: expected one of {', '.join(known)}")
    limits = {name: parse_size(limit) if name in BYTES else float(limit) for name, limit in budgets.items()}
    for name, limit in limits.items():
        if not math.isfinite(limit) or limit < 0:
            raise MpqError(f"invalid budget {name}={limit}: expected a finite number of at least 0")
    return limits


def _cache_loss(table: SensitivityTable, cache: CacheFormats | None) -> tuple[float, float]:
    """Predicted loss of a cache and its variance; 0 for entries that a table does not know."""
    rows = {layer.name: i for i, layer in enumerate(table.layers) if layer.is_cached}
    columns = {scheme: j for j, scheme in enumerate(table.schemes)}
    formats = {} if cache is None else cache.format_of
    wanted = [(rows.get(name), columns.get(Scheme(one, cached=True).name)) for name, one in formats.items()]
    known = [(i, j) for i, j in wanted if i is not None and j is not None]
    return sum(float(table.scores[cell]) for cell in known), sum(float(table.errors[cell]) ** 2 for cell in known)


def restricted(problem: Problem, schemes: Iterable[str]) -> Problem:
    """The problem with fewer schemes, in the problem's order; MpqError when a group has none left."""
    kept = match_names(schemes, problem.schemes, "scheme")
    columns = [problem.schemes.index(scheme) for scheme in kept]
    for group in np.flatnonzero(~np.isfinite(problem.losses[:, columns]).any(1)).tolist():
        raise MpqError(f"{problem.group_name(group)} can take none of {', '.join(kept)}: keep more schemes")
    return replace(
        problem, schemes=tuple(kept), losses=problem.losses[:, columns], variances=problem.variances[:, columns],
        costs={name: cost[:, columns] for name, cost in problem.costs.items()},
    )  # fmt: skip


def _groups(layers: Sequence[Layer], ties: bool) -> tuple[tuple[int, ...], ...]:
    members: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(f"tie {layer.tie}" if ties and layer.tie else f"layer {layer.name}", []).append(index)
    return tuple(tuple(group) for group in members.values())


def _cost(layers: Sequence[Layer], schemes: Sequence[Scheme], cost: Callable[[Layer, Scheme], float]) -> Array:
    return np.array([[cost(layer, scheme) for scheme in schemes] for layer in layers], dtype=np.float64)


def _summed(by_layer: Array, groups: Sequence[Sequence[int]]) -> Array:
    return np.stack([by_layer[list(group)].sum(0) for group in groups])
