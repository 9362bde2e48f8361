"""Restricting searches to schemes that a target or another quantizer supports; errors name supported ones."""

import glob
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpq.core.allocation import Allocation, check_allocation
from mpq.core.cache import EVERY, parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.registry import Target
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable

_log = logging.getLogger(__name__)
FLOAT = "bf16"  # format of layers that stay in floating point


class Holder(Protocol):
    """A target, or another quantizer."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def schemes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def fuses(self) -> bool: ...  # noqa: D102
    @property
    def fallbacks(self) -> Mapping[str, str]: ...  # noqa: D102
    def refusal(self, layer: Layer, scheme: Scheme) -> str: ...  # noqa: D102


def check_model(target: Target, model: Any) -> None:
    """MpqError when the target does not know such a model, or a package that writes its files is missing."""
    if not target.takes(model):
        raise MpqError(f"{target.name} supports {target.models}, not {type(model).__name__}: export to mpq instead")
    from mpq.network.experts import has_experts  # needs torch, unlike the rest of this module

    if not target.experts and has_experts(model):
        raise MpqError(f"{target.name} does not support experts: use the targets mpq or gguf")
    check_packages(target)


def check_packages(target: Target) -> None:
    """MpqError when a package that writes the target's files is missing."""
    if not all(find_spec(package) for package in target.packages):
        needed = " and ".join(target.packages)
        raise MpqError(f"{target.name} files are written with {needed}: pip install 'mpq[{target.extra}]'")


def warn_about_versions(target: Target) -> None:
    """Warn if the target's program is installed here in a version that was not measured."""
    for consumer in target.consumers:
        if why := consumer.objection():
            _log.warning("%s: try the folder there before you rely on it", why)


def check(holder: Holder, allocation: Allocation) -> None:
    """MpqError if a layer has an unsupported scheme, naming the nearest supported one."""
    for layer in check_allocation(allocation).layers:
        scheme = allocation.scheme_of[layer.name]
        why = holder.refusal(layer, scheme)
        if why:
            near = nearest(holder, layer, scheme)
            advice = f"the nearest it supports is {near}" if near else "leave the layer out"
            raise MpqError(f"{holder.name} does not support layer {layer.name} in {scheme.name} ({why}): {advice}")
    if holder.fuses:
        _check_ties(holder, allocation)


def _check_ties(holder: Holder, allocation: Allocation) -> None:
    first: dict[str, Layer] = {}
    for layer in allocation.layers:
        other = first.setdefault(layer.tie or layer.name, layer)
        schemes = allocation.scheme_of[other.name].name, allocation.scheme_of[layer.name].name
        if schemes[0] != schemes[1]:
            readers = getattr(holder, "readers", "") or holder.name
            raise MpqError(
                f"{readers} fuse {other.name} and {layer.name}, so they must share a scheme, "
                f"not {schemes[0]} and {schemes[1]}: search with ties"
            )


def nearest(holder: Holder, layer: Layer, scheme: Scheme) -> str | None:
    """The holder's own fallback, else the supported well-known scheme closest in bits, preferably of the same kind of
    grid.
    """
    instead = holder.fallbacks.get(scheme.name)
    while instead is not None:
        if not holder.refusal(layer, parse_scheme(instead)):
            return instead
        instead = holder.fallbacks.get(instead)
    bits = scheme.weight.effective_bits(layer.rows, layer.cols)

    def distance(name: str) -> tuple[bool, float, bool]:
        other = parse_scheme(name)
        gap = abs(other.weight.effective_bits(layer.rows, layer.cols) - bits)
        same = other.weight.grid.family == scheme.weight.grid.family
        return not same, round(gap, 2), (other.activation is None) != (scheme.activation is None)

    possible = [name for name in holder.schemes if not holder.refusal(layer, parse_scheme(name))]
    return min(possible, key=distance, default=None)


@dataclass(frozen=True, eq=False)
class Held:
    """A table restricted to the schemes that holders support.

    Layers that support none of its schemes, and those tied to them, are offered bf16 without loss.
    """

    name: str  # names of the holders
    fuses: bool  # ties must be kept
    table: SensitivityTable
    forbid: Mapping[str, tuple[str, ...]]  # schemes by layer pattern, as `build_problem` takes them
    floats: Mapping[str, str]  # why a layer stays in bf16, by its name
    instead: tuple[str, str] = ("", "")  # one of those layers, and the nearest format that it supports

    @property
    def sentence(self) -> str:
        """One sentence on layers without a supported scheme; "" if there are none."""
        if not self.floats:
            return ""
        name, why = next(iter(self.floats.items()))
        more = f" and {len(self.floats) - 1} more" if len(self.floats) > 1 else ""
        layer, near = self.instead
        advice = f"; add {near}, the nearest that {layer} supports" if near else ""
        return f"{self.name} supports {name}{more} in none of the formats ({why}): left in floating point{advice}"

    def least(self, *, ties: bool = True, **restrictions: Any) -> float:
        """Bytes of the smallest allocation of weights, including the overhead."""
        problem = build_problem(self.table, forbid=self.forbid, ties=ties or self.fuses, **restrictions)
        return problem.overhead + float(
            np.where(np.isfinite(problem.losses), problem.costs["size"], np.inf).min(1).sum()
        )

    def check_budget(
        self, *, bits: float | None = None, size: float | str | None = None, ties: bool = True, **restrictions: Any
    ) -> None:
        """MpqError when no allocation is within the budget; `restrictions` are `build_problem`'s, such as `pin`."""
        if not self.name:
            return
        problem = build_problem(self.table, forbid=self.forbid, ties=ties or self.fuses, **restrictions)
        least = float(np.where(np.isfinite(problem.losses), problem.costs["size"], np.inf).min(1).sum())
        if bits is not None and bits * problem.weights / 8 * (1 + 1e-9) < least:
            given, needed = f"{bits:g} bits", f"{_up(8 * least / problem.weights):g} bits"
        elif size is not None and parse_size(size) < least + problem.overhead:
            given, needed = f"{parse_size(size):,.0f} bytes", f"{least + problem.overhead:,.0f} bytes"
        else:
            return
        advice = "raise the budget or add smaller formats"
        if not self.instead[1] and self.floats and (others := len(problem.layers) - len(self.floats)):
            left = " and ".join(list(self.floats)[:2]) if len(self.floats) < 3 else f"{len(self.floats)} layers"
            advice = (
                f"raise it, or exclude {left} (--exclude), so that the budget counts only the other {others} layers"
            )
        why = f" ({self.sentence})" if self.sentence else ""
        raise MpqError(f"a budget of {given} is below the smallest allocation for {self.name}, {needed}{why}: {advice}")


def _up(bits: float) -> float:
    return float(np.ceil(bits * 1000) / 1000)


def restrict(table: SensitivityTable, *holders: Holder) -> Held:
    """The part of a table that all given targets and quantizers support; all of it without any.

    Raises:
        MpqError: a layer that cannot be bf16 either.
    """

    def refusal(layer: Layer, scheme: Scheme) -> str:
        if layer.is_cached:
            return next(filter(None, (_cache_refusal(holder, scheme) for holder in holders)), "")
        return next(filter(None, (holder.refusal(layer, scheme) for holder in holders)), "")

    name, fuses = " and ".join(holder.name for holder in holders), any(holder.fuses for holder in holders)
    every = [parse_scheme(name) for name in table.schemes]
    schemes = [scheme for scheme in every if not scheme.cached]
    alike = {False: schemes, True: [scheme for scheme in every if scheme.cached]}
    reasons = {
        layer.name: {scheme.name: why for scheme in alike[layer.is_cached] if (why := refusal(layer, scheme))}
        for layer in table.layers
    }
    cached = {layer.name for layer in table.entries}
    without = {
        name: next(iter(bad.values()))
        for name, bad in reasons.items()
        if len(bad) == len(schemes) and name not in cached
    }
    ties = {layer.tie for layer in table.layers if layer.tie and layer.name in without and fuses}
    offered = [layer.name in without or layer.tie in ties for layer in table.layers]
    forbid = {glob.escape(name): tuple(bad) for name, bad in reasons.items() if bad}
    if without:
        for layer in table.layers:
            if layer.name in without and (why := refusal(layer, parse_scheme(FLOAT))):
                raise MpqError(f"{name} does not support layer {layer.name} in any format ({why}): exclude it")
        table = _with_floats(table, np.array(offered))
        for layer in (layer for layer, one in zip(table.layers, offered, strict=True) if not one):
            pattern = glob.escape(layer.name)
            forbid[pattern] = (*forbid.get(pattern, ()), FLOAT)
    coded = [scheme for scheme in schemes if not scheme.weight.is_float_copy]
    floats = {
        one: bad[coded[0].name] for one, bad in reasons.items() if coded and all(each.name in bad for each in coded)
    }
    floats = {**without, **floats}
    instead = _instead(holders[0], table, floats, coded) if len(holders) == 1 and coded else ("", "")
    return Held(name, fuses, table, forbid, floats, instead)


def _instead(
    holder: Holder, table: SensitivityTable, floats: Iterable[str], coded: Sequence[Scheme]
) -> tuple[str, str]:
    """The first layer in floating point that supports another scheme, and the nearest such scheme."""
    left = set(floats)
    for layer in table.layers:
        near = nearest(holder, layer, coded[0]) if layer.name in left else None
        if near is not None and not parse_scheme(near).weight.is_float_copy:
            return layer.name, near
    return "", ""


def _cache_refusal(holder: Holder, scheme: Scheme) -> str:
    known = getattr(holder, "caches", EVERY)
    if known == EVERY or scheme.weight in map(parse_cache_format, known):
        return ""
    return f"its cache is in {' or '.join(known) or 'floating point'}"


def _with_floats(table: SensitivityTable, offered: NDArray[np.bool_]) -> SensitivityTable:
    """The table with a column of bf16, of loss 0 where it is offered."""
    column = np.where(offered, 0.0, np.nan)[:, None]
    names = {layer.name for layer, one in zip(table.layers, offered, strict=True) if one}
    return replace(
        table, schemes=(*table.schemes, FLOAT), scores=np.hstack([table.scores, column]),
        errors=np.hstack([table.errors, np.zeros_like(column)]),
        reasons={name: why for name, why in table.reasons.items() if name not in names},
    )  # fmt: skip


def unscored(layers: Sequence[Layer], schemes: Iterable[str], overhead: int = 0) -> SensitivityTable:
    """A table of zeros, for checks of sizes alone."""
    names = tuple(dict.fromkeys(parse_scheme(name).name for name in schemes))
    zeros = np.zeros((len(layers), len(names)))
    return SensitivityTable(tuple(layers), names, zeros, zeros, "", {"overhead": overhead})
