"""Weights stored in bfloat16 and every product computed in float32 (LayerCast, arXiv 2506.09501, section 5).

Runs then agree across batch sizes, devices and reduction orders as float32's do, at half of float32's weight memory.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.patterns import match_names


class LayerCast(nn.Module):
    """A linear layer with bfloat16 weight and bias, cast to float32 at each call; (..., in) to float32 (..., out).

    Its state has the linear layer's own names, so checkpoints of either load into the other.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """`linear(input.float(), weight.float(), bias.float())`, exactly."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input.float(), self.weight.float(), bias)


def layercast(model: nn.Module, *, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()) -> nn.Module:
    """The model itself in float32, with its linear layers replaced by LayerCast ones.

    A weight that a linear layer shares with another module (tied embeddings) is stored twice after.

    Raises:
        MpqError: no linear layer, or a pattern that matches none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    if not names:
        raise MpqError(f"{type(model).__name__} has no linear layer to cast")
    left_out = set(match_names(exclude, names))
    model.float()
    for name in match_names(include, names):
        if name not in left_out:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, LayerCast(linear))
    return model
