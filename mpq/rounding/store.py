"""Who rounds a model's layers: a store that keeps what it rounded, or tables that were finished elsewhere.

Each layer is rounded once in each format: evaluating an allocation then costs a forward pass and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.shelf import LIMIT, Shelf
from mpq.rounding import Method, method_named
from mpq.rounding.reference import Quantized


class Rounder(Protocol):
    """Gives every layer's weight in a scheme."""

    @property
    def name(self) -> str:
        """Of the rounding method, for the record."""

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The layer's weight (rows, cols) in a scheme; MpqError (layer named) when it cannot be rounded."""


class RoundingStore:
    """Rounded weights of one model's layers by one method, about a byte for each weight and format.

    Args:
        method: rounding method, by name or itself.
        second_moments: of the layers' inputs, by layer name, where the method uses them.
        limit: bytes in memory; what is beyond lies in memory-mapped files.
    """

    def __init__(
        self, method: "str | Method" = "mse", second_moments: Mapping[str, Tensor] | None = None, limit: int = LIMIT
    ) -> None:
        self.second_moments = second_moments or {}
        self._choose = method_named(method) if isinstance(method, str) else method
        self.name = method if isinstance(method, str) else getattr(method, "__name__", "custom")
        self._shelf = Shelf(limit)
        self._rounded: dict[tuple[str, str], Quantized] = {}

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The layer's weight (rows, cols), always the same one, in a scheme; MpqError (layer named) when it cannot."""
        key = (layer.name, scheme.weight.name)
        if key not in self._rounded:
            try:
                quantized = self._choose(weight.detach(), scheme.weight, self.second_moments.get(layer.name))
            except MpqError as error:
                raise MpqError(f"layer {layer.name} in {scheme.name}: {error}") from error
            kept = replace(quantized, codes=self._shelf.keep(quantized.codes))
            self._rounded[key] = kept.map_tables(lambda _, table: self._shelf.keep(table))
        return self._rounded[key]


@dataclass(frozen=True, eq=False)
class Finished:
    """Layers that were rounded for one allocation, such as with tuned scales; the others come from a rounder."""

    name: str
    rounded: Mapping[str, Quantized]  # by layer name
    others: Rounder

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The finished weight where it has the scheme's format."""
        found = self.rounded.get(layer.name)
        if found is not None and found.format == scheme.weight:
            return found
        return self.others.quantized(layer, weight, scheme)


def rounder_of(method: str | Rounder, second_moments: Mapping[str, Tensor] | None = None) -> Rounder:
    """The rounder itself, or a new store of a method by name."""
    return RoundingStore(method, second_moments) if isinstance(method, str) else method
