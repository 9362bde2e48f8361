"""Sums in other orders, as with other batch sizes, devices and tensor-parallel widths.

A product of k summands is split into chunks whose partial sums are rounded to the type and added sequentially, as in
split-K kernels and all-reduces; mathematically the product is the same.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.lowprecision.layercast import LayerCast


def chunked_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, chunks: int) -> Tensor:
    """`linear` with the summed dimension split into chunks: products and sums in float32 within a chunk (float64 for
    float64), every partial sum and every addition rounded to the inputs' type.

    Raises:
        MpqError: less than one chunk.
    """
    if chunks < 1:
        raise MpqError(f"invalid number of chunks: expected at least 1, not {chunks}")
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    total: Tensor | None = None
    size = -(-inputs.shape[-1] // chunks)
    for part, weights in zip(torch.split(inputs, size, -1), torch.split(weight, size, -1), strict=True):
        partial = functional.linear(part.to(wide), weights.to(wide)).to(inputs.dtype)
        total = partial if total is None else total + partial
    assert total is not None
    return total if bias is None else total + bias.to(inputs.dtype)


class ChunkedLinear(nn.Module):
    """A linear or LayerCast layer that sums in chunks, in the type of its weight or, for LayerCast, float32."""

    def __init__(self, layer: nn.Linear, chunks: int) -> None:
        super().__init__()
        self.weight, self.bias, self.chunks = layer.weight, layer.bias, chunks
        self.dtype = torch.float32 if isinstance(layer, LayerCast) else layer.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return chunked_linear(input.to(self.dtype), self.weight.to(self.dtype), bias, self.chunks)


def in_chunks(model: nn.Module, chunks: int) -> nn.Module:
    """A copy of the model whose linear and LayerCast layers sum in chunks.

    Raises:
        MpqError: no such layer.
    """
    chunked = copy.deepcopy(model)
    layers = {name: module for name, module in chunked.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise MpqError(f"{type(model).__name__} has no linear layer to sum in chunks")
    for name, layer in layers.items():
        chunked.set_submodule(name, ChunkedLinear(layer, chunks))
    return chunked
