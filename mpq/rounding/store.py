"""Each layer rounded once in each format: evaluating an allocation then costs a forward pass and nothing else."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.shelf import LIMIT, Shelf
from mpq.rounding import Method, method_named
from mpq.rounding.reference import Quantized


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
        self._shelf = Shelf(limit)
        self._rounded: dict[tuple[str, str], Quantized] = {}

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        """The layer's weight (rows, cols), always the same one, in a scheme; MpqError (layer named) when it cannot."""
        key = (layer.name, scheme.weight.name)
        if key not in self._rounded:
            try:
                found = self._choose(weight.detach(), scheme.weight, self.second_moments.get(layer.name))
            except MpqError as error:
                raise MpqError(f"layer {layer.name} in {scheme.name}: {error}") from error
            kept = replace(found, codes=self._shelf.keep(found.codes))
            self._rounded[key] = kept.map_tables(lambda _, table: self._shelf.keep(table))
        return self._rounded[key]
