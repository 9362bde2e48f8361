"""Rounding a layer's inputs to an activation format, with dynamic or static scales."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mpq.core.formats import Format
from mpq.rounding.reference import dequantize, quantize


def fake_quantize_inputs(module: nn.Module, inputs: Tensor, format: Format, scale: float | None = None) -> Tensor:
    """The inputs rounded to the format, in their own shape and type.

    Rows are tokens: the features of one position, channels for a convolution. Groups run along a row. `scale` is a
    static scale for formats with one scale for the tensor; larger inputs are clipped.
    """
    channels = inputs.ndim - len(module.kernel_size) - 1 if isinstance(module, _ConvNd) else -1
    tokens = inputs.movedim(channels, -1)
    matrix = tokens.reshape(-1, tokens.shape[-1])
    scales = None if scale is None else torch.full((1, 1), scale, device=inputs.device, dtype=torch.float32)
    rounded = dequantize(quantize(matrix, format, scales=scales)).reshape(tokens.shape)
    return rounded.movedim(-1, channels).to(inputs.dtype)


def straight_through(values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(values)` with the identity as its gradient (straight-through, arXiv 1308.3432)."""
    rounded: Tensor = _StraightThrough.apply(values, rounding)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
