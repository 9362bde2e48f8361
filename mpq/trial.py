"""One simulated model that takes on allocation after allocation: only what differs from the last one is written."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.scheme import Scheme
from mpq.network.batchnorm import put_means, stored_means
from mpq.network.layers import matrix_to_weight, weight_matrix
from mpq.quantized import InputRounding, checked_layers
from mpq.rounding.reference import dequantize
from mpq.rounding.store import RoundingStore


class Trial:
    """A copy of a model in the formats of one allocation at a time, for measuring; the original is left as it is."""

    def __init__(self, original: nn.Module, store: RoundingStore) -> None:
        self.original, self.store = original, store
        self.model = copy.deepcopy(original)
        self._schemes: dict[str, Scheme] = {}
        self._hooks: dict[str, list[torch.utils.hooks.RemovableHandle]] = {}

    @torch.no_grad()
    def take_on(self, allocation: Allocation, means: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The copy, holding the allocation's weights, and these running means in place of the original's.

        Raises:
            MpqError: the allocation's layers are not the model's, or a weight cannot be rounded (named).
        """
        for layer, scheme in checked_layers(self.original, allocation):
            if self._schemes.get(layer.name) == scheme:
                continue
            weight = weight_matrix(self.original.get_submodule(layer.name))
            modules = [self.model.get_submodule(name) for name in layer.names]
            target: Tensor = modules[0].weight  # type: ignore[assignment]
            target.copy_(matrix_to_weight(dequantize(self.store.quantized(layer, weight, scheme)), modules[0]))
            for hook in self._hooks.pop(layer.name, []):
                hook.remove()
            if scheme.activation is not None:
                rounding = InputRounding(scheme.activation)
                users = [module for module in modules if not isinstance(module, nn.Embedding)]
                self._hooks[layer.name] = [
                    module.register_forward_pre_hook(rounding, with_kwargs=True) for module in users
                ]
            self._schemes[layer.name] = scheme
        put_means(self.model, {**stored_means(self.original), **(means or {})})
        return self.model
