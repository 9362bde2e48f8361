"""Bound on the error of a packed model against plain float32, derived from the kernels' arithmetic."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


def apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    if isinstance(layer, Conv1D):
        return functional.linear(x, weight.t(), bias)
    return layer._conv_forward(x, weight, bias)


@torch.no_grad()
def radius(layer: nn.Module, x: Tensor, integers: bool = True) -> Tensor:
    """Bound on the error of a layer's outputs, for its present weights.

    Where activations become integers (never in grouped convolutions), half a step of 1/32639 of a token's largest (two
    planes of int8), and codebooks half a step of 1/32767 of their largest value; float32 sums of at most 9 tiles, eight
    operations each, relative to the sum of magnitudes with a zero point in. PyTorch's own sums, over a row's products
    and the bias, and four roundings of what follows the layer: 2**-24 relative each.
    """
    x, weight = x.double().abs(), layer.weight.double().abs()
    bias = None if layer.bias is None else layer.bias.double().abs()
    rows = weight.t() if isinstance(layer, Conv1D) else weight.flatten(1)
    allowed = (rows.shape[1] + 1 + 4) * 2**-24 * apply(layer, x, weight, bias)
    if integers and getattr(layer, "groups", 1) == 1:
        most = (
            x.max().expand_as(x) if isinstance(layer, nn.Conv1d | nn.Conv2d) else x.amax(-1, keepdim=True).expand_as(x)
        )
        largest = rows.amax(1, keepdim=True).expand_as(rows)
        largest = largest.t() if isinstance(layer, Conv1D) else largest.reshape(weight.shape)
        allowed += apply(layer, most, weight, None) / 65278
        allowed += apply(layer, x, largest, None) * (1 / 65534 + 9 * 8 * 2**-24)
    return allowed


def room(model: nn.Module, *inputs: Tensor, integers: bool = True) -> Tensor:
    """Bound on the error of the model's outputs: each layer's bound times the output's sensitivity, to first order.

    The second order is 1e-4 of the first here; a tenth is added for it. Activation rounding counts as the identity:
    differences must not move an activation across a rounding boundary.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, args[0].detach().clone(), output if output.requires_grad else output.requires_grad_()))

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, KINDS)]
    try:
        with torch.enable_grad():
            out = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    each = torch.eye(out.numel()).reshape(-1, *out.shape)
    slopes = torch.autograd.grad(out, [output for _, _, output in calls], each, is_grads_batched=True)
    parts = [
        (slope.double().abs() * radius(layer, x, integers)).flatten(1).sum(1)
        for slope, (layer, x, _) in zip(slopes, calls, strict=True)
    ]
    return 1.1 * torch.stack(parts).sum(0).reshape(out.shape)


def assert_close(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    error = (found.double() - expected.double()).abs()
    assert (error <= allowed).all(), f"up to {(error / allowed).max():.2g} times what is allowed"
