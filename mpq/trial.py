"""A simulated model that switches between allocations; only layers that differ are rewritten."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.scheme import Scheme
from mpq.network.batchnorm import put_means, stored_means
from mpq.network.copies import copied
from mpq.network.layers import matrix_to_weight, weight_matrix
from mpq.quantized import checked_layers, round_cache, round_inputs
from mpq.rounding.reference import dequantize
from mpq.rounding.store import Rounder


class Trial:
    """A copy of a model in the formats of one allocation at a time, for measuring; the original is unchanged."""

    def __init__(self, original: nn.Module, rounder: Rounder) -> None:
        self.original, self.rounder = original, rounder
        self.model = copied(original)
        self._held: dict[str, tuple[Rounder, Scheme]] = {}
        self._hooks: dict[str, list[torch.utils.hooks.RemovableHandle]] = {}
        self._cache: CacheFormats | None = None
        self._cache_hooks: list[torch.utils.hooks.RemovableHandle] = []

    @torch.no_grad()
    def take_on(
        self, allocation: Allocation, means: Mapping[str, Tensor] | None = None, rounder: Rounder | None = None
    ) -> nn.Module:
        """The copy with the allocation's weights, and with these running means if given.

        `rounder` replaces the trial's own for this call.

        Raises:
            MpqError: the allocation's layers are not the model's, or a weight cannot be rounded (named).
        """
        for layer, scheme in checked_layers(self.original, allocation):
            wanted = (rounder or self.rounder, scheme)
            if self._held.get(layer.name) == wanted:
                continue
            quantized = wanted[0].quantized(layer, weight_matrix(self.original.get_submodule(layer.name)), scheme)
            modules = [self.model.get_submodule(name) for name in layer.names]
            target: Tensor = modules[0].weight  # type: ignore[assignment]
            target.copy_(matrix_to_weight(dequantize(quantized), modules[0]))
            for hook in self._hooks.pop(layer.name, []):
                hook.remove()
            self._hooks[layer.name] = round_inputs(modules, scheme)
            self._held[layer.name] = wanted
        if allocation.cache != self._cache:
            for hook in self._cache_hooks:
                hook.remove()
            self._cache, self._cache_hooks = allocation.cache, round_cache(self.model, allocation.cache)
        put_means(self.model, {**stored_means(self.original), **(means or {})})
        return self.model
