"""Rounders of a model's layers: by a method, by a store that caches results, or from finished tables.

Each layer is rounded once in each format, so that evaluating an allocation costs only a forward pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import Batch, LossFn
from mpq.network.moments import moments_in_turn
from mpq.network.shelf import LIMIT, Kept, Shelf
from mpq.rounding import METHODS, Method, method_named
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import Quantized, no_codes

Pairs: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]  # layer names and moments
Moments: TypeAlias = Pairs | Callable[[], Pairs] | None


class Rounder(Protocol):
    """Rounds every layer's weight in a scheme."""

    @property
    def name(self) -> str:
        """Name of the rounding method, for provenance."""

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The layer's weight (rows, cols) in a scheme; MpqError (layer named) when it cannot be rounded."""


class MethodRounder:
    """Rounds a layer at each call, without a cache.

    Args:
        method: rounding method, by name or itself.
        second_moments: of the layers' inputs, by layer name or in turn, where the method uses them, or a function that
            returns them, called when the first layer is rounded.
    """

    def __init__(self, method: "str | Method" = "mse", second_moments: Moments = None) -> None:
        self._second_moments = second_moments or {}
        self._choose = method_named(method) if isinstance(method, str) else method
        self.name = method if isinstance(method, str) else getattr(method, "__name__", "custom")

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The layer's weight (rows, cols) in a scheme; MpqError (layer named) when it cannot be rounded.

        A mix takes its rows from the weight rounded in each of its formats.
        """
        if scheme.mix is None:
            return self._in_one_format(layer, weight, scheme)
        wholes = [self._in_one_format(layer, weight, Scheme(format)) for format in scheme.mix.formats]
        try:
            return mixed(scheme.mix, wholes)
        except MpqError as error:
            raise MpqError(f"layer {layer.name}: {error}") from error

    def _in_one_format(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        try:
            return self._choose(weight.detach(), scheme.weight, self._moment(layer.name))
        except MpqError as error:
            raise MpqError(f"layer {layer.name} in {scheme.name}: {error}") from error

    def _moment(self, layer: str) -> Tensor | None:
        """The second moment of a layer's inputs, if it is known."""
        if not isinstance(self._second_moments, Mapping):
            self._second_moments = dict(self._all_moments())
        return self._second_moments.get(layer)

    def _all_moments(self) -> Iterable[tuple[str, Tensor]]:
        found = self._second_moments() if callable(self._second_moments) else self._second_moments
        return found.items() if isinstance(found, Mapping) else found


class RoundingStore(MethodRounder):
    """Rounds each layer of one model once in each format; keeps about a byte per weight and format, and the moments.

    Args:
        method, second_moments: as of `MethodRounder`.
        limit: bytes in memory; the rest is stored in files.
    """

    def __init__(self, method: "str | Method" = "mse", second_moments: Moments = None, limit: int = LIMIT) -> None:
        super().__init__(method, second_moments)
        self._shelf = Shelf(limit)
        self._moments: dict[str, Kept] | None = None
        self._last: tuple[str, Tensor | None] = "", None  # a layer and its moment, so that its factor can be used again
        self._rounded: dict[tuple[str, str], tuple[Quantized, Kept]] = {}

    def _in_one_format(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        key = (layer.name, scheme.weight.name)
        if key not in self._rounded:
            quantized = super()._in_one_format(layer, weight, scheme)
            self._rounded[key] = (
                replace(quantized, codes=no_codes(quantized.codes)),
                self._shelf.keep(quantized.codes),
            )
        tables, kept = self._rounded[key]
        return replace(tables, codes=kept())

    def _moment(self, layer: str) -> Tensor | None:
        if self._moments is None:
            self._moments = {name: self._shelf.keep(moment) for name, moment in self._all_moments()}
            self._second_moments = {}
        if self._last[0] != layer:
            self._last = layer, self._moments[layer]() if layer in self._moments else None
        return self._last[1]


@dataclass(frozen=True, eq=False)
class Finished:
    """Layers that were rounded for one allocation, such as with tuned scales; the others come from a rounder."""

    name: str
    rounded: Mapping[str, Quantized]  # by layer name
    others: Rounder

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The finished weight where it has the scheme's format."""
        stored = self.rounded.get(layer.name)
        if stored is not None and stored.format == scheme.weight:
            return stored
        return self.others.quantized(layer, weight, scheme)


def rounder_of(method: str | Rounder, second_moments: Moments = None) -> Rounder:
    """The rounder itself, or that of a method by name."""
    return MethodRounder(method, second_moments) if isinstance(method, str) else method


def moments_needed(
    method: str, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> Iterable[tuple[str, Tensor]]:
    """Layer names and second moments of the layers' inputs, in turn, if the rounding method needs them; else none."""
    return moments_in_turn(model, layers, batches, forward) if METHODS.named(method).second_moment else ()
