"""A differentiable search over formats, as DNAS (arXiv 1812.00090): layers compute in softmax mixtures of roundings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.layers import matrix_to_weight, weight_matrix
from mpq.rounding.activations import fake_quantize_inputs
from mpq.rounding.reference import dequantize, quantize


class SoftmaxFormats(nn.Module):
    """Weights and inputs of each layer are softmax mixtures of their roundings, with trainable logits.

    `costs` are (layers, schemes). Gradients pass the roundings straight through and reach the logits through the
    mixtures and the expected cost.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], schemes: Sequence[Scheme], costs: Any) -> None:
        super().__init__()
        self.schemes = tuple(schemes)
        self.costs = torch.as_tensor(costs, dtype=torch.float32)
        self.logits = nn.Parameter(torch.zeros(len(layers), len(schemes)))
        self.handles = []
        for index, layer in enumerate(layers):
            module = model.get_submodule(layer.name)
            self.handles.append(module.register_forward_pre_hook(self._before(index)))
            self.handles.append(module.register_forward_hook(_after))

    def expected_cost(self) -> Tensor:
        """Expected total cost, in the costs' unit."""
        return (self.logits.softmax(1) * self.costs).sum()

    def log_probabilities(self) -> NDArray[np.float64]:
        """(layers, schemes)."""
        return self.logits.detach().double().log_softmax(1).numpy()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _before(self, index: int) -> Any:
        def mix(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            shares = self.logits[index].softmax(0)
            matrix = weight_matrix(module)
            with torch.no_grad():
                weights = [
                    matrix_to_weight(dequantize(quantize(matrix, scheme.weight)), module) for scheme in self.schemes
                ]
                inputs = [
                    fake_quantize_inputs(module, args[0], scheme.activation)
                    for scheme in self.schemes
                    if scheme.activation is not None
                ]
            weight: Tensor = module.weight  # type: ignore[assignment]
            module.__dict__["weight"] = _mixture(weight, weights, shares)
            return (_mixture(args[0], inputs, shares),)

        return mix


def _after(module: nn.Module, args: Any, output: Any) -> None:
    del module.__dict__["weight"]


def _mixture(values: Tensor, rounded: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The mixture of roundings, whose gradient by the values is the identity's."""
    mixed = torch.tensordot(shares, torch.stack(list(rounded)), dims=1)
    return mixed + (values - values.detach())
