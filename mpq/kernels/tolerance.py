"""Error bounds of packed layers against floating point, derived from the kernels' arithmetic."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.network.layers import layer_kind

ACTIVATION_STEP = 1 / 65278  # half a step of 1/32639 of a token's largest: activations as two planes of int8
CODEBOOK_STEP = 1 / 65534  # half a step of 1/32767 of a codebook's largest value
TILE_SUMS = 9 * 8 * 2**-24  # float32 sums of at most nine tiles, eight operations each
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
OWN_CODE = 1e-3  # relative to the largest output, for a layer with a custom forward


def kernel_error(module: nn.Module, inputs: Tensor | None, output: Tensor) -> Tensor:
    """Bound of the difference between a packed layer's outputs and those of `module`, which holds the same values.

    Elementwise, to first order. Accounts for floating-point sums on both sides, activations and codebooks rounded to
    integers, and both models' types: a 16-bit model's weights are rounded, packed ones are not.
    """
    size = output.abs().to(torch.promote_types(output.dtype, torch.float32))
    unit = torch.finfo(output.dtype).eps / 2 if output.is_floating_point() else 0.0
    if isinstance(module, nn.Embedding) and type(module) is nn.Embedding:
        return 2 * unit * size
    if inputs is None or not (type(module) in PLAIN or layer_kind(module) == "transformers-conv1d"):
        return torch.full_like(size, OWN_CODE * _largest(size)) + 2 * unit * size
    x = inputs.float().abs()
    weight: Tensor = module.weight.float().abs()  # type: ignore[operator]
    bias: Any = None if module.bias is None else module.bias.float().abs()  # type: ignore[operator]
    transposed = layer_kind(module) == "transformers-conv1d"
    cols = len(weight) if transposed else weight[0].numel()
    sums = (cols + 1 + 4) * 2**-24 + (unit if unit > 2**-24 else 0.0)
    if output.device.type == "cuda":
        sums += 2**-8  # products of bfloat16
    allowed = sums * _apply(module, x, weight, bias) + 2 * unit * size
    if getattr(module, "groups", 1) == 1:
        most = x.amax() if isinstance(module, (nn.Conv1d, nn.Conv2d)) else x.amax(-1, keepdim=True)
        along = 0 if transposed else tuple(range(1, weight.ndim))  # a row's weights
        largest = weight.amax(along, keepdim=True).expand_as(weight)
        allowed = allowed + ACTIVATION_STEP * _apply(module, most.expand_as(x), weight, None)
        allowed = allowed + (CODEBOOK_STEP + TILE_SUMS) * _apply(module, x, largest, None)
    return 1.1 * allowed


def same_code_error(expected: Tensor) -> Tensor:
    """Bound of the difference between equal operations whose sums run in another order."""
    room = 0.0
    if expected.is_floating_point():
        room = 64 * torch.finfo(expected.dtype).eps * _largest(expected.abs())
    return torch.tensor(room, dtype=torch.float64, device=expected.device).expand(expected.shape)


def _largest(size: Tensor) -> float:
    finite = size[size.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _apply(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        output: Tensor = module._conv_forward(x, weight, bias)
        return output
    return functional.linear(x, weight if layer_kind(module) == "linear" else weight.t(), bias)
