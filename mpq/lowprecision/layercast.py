"""Weights stored in 16 bits, or packed, and every product computed in float32 (LayerCast, arXiv 2506.09501, section 5).

Runs then agree across batch sizes, devices and reduction orders as float32's do, at half of float32's weight memory.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.patterns import match_names
from mpq.kernels.modules import PackedConv, PackedEmbedding, PackedLinear
from mpq.kernels.reference import quantize_activation
from mpq.network.layers import layer_kind, own_code

SHORT = (torch.bfloat16, torch.float16)


def in_float32(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The forward pass without autocast, which would compute its products in 16 bits."""

    @wraps(forward)
    def run(self: Any, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return forward(self, input)

    return run


class LayerCast(nn.Module):
    """A layer with 16-bit weight and bias, cast to float32 at each call; names, ties and state are the layer's own.

    Casts of the model move these parameters but do not change their type.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerCast":
        kept = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, float32."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return weight.float(), None if bias is None else bias.float()


class LayerCastLinear(LayerCast, nn.Linear):
    """A linear layer; (..., in) to float32 (..., out)."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """`linear(input.float(), weight.float(), bias.float())`, exactly."""
        return functional.linear(input.float(), *self.numbers())


class LayerCastConv1D(LayerCast):
    """A linear layer of transformers' GPT-2, whose weight is (in, out)."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """The product of (..., in) with (in, out), float32."""
        weight, bias = self.numbers()
        return functional.linear(input.float(), weight.t(), bias)


class LayerCastConv1d(LayerCast, nn.Conv1d):
    """A one-dimensional convolution."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """The convolution in float32."""
        return self._conv_forward(input.float(), *self.numbers())  # type: ignore[no-any-return]


class LayerCastConv2d(LayerCast, nn.Conv2d):
    """A two-dimensional convolution."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """The convolution in float32."""
        return self._conv_forward(input.float(), *self.numbers())  # type: ignore[no-any-return]


class LayerCastEmbedding(LayerCast, nn.Embedding):
    """An embedding; (...) to float32 (..., width)."""

    def forward(self, input: Tensor) -> Tensor:
        """The rows that were looked up, cast."""
        return super().forward(input).float()


class LayerCastPackedLinear(PackedLinear):
    """A packed linear layer that multiplies dequantized weights in float32, without the kernels' own arithmetic."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to float32 (..., out_features)."""
        input = input.float()
        input = quantize_activation(input, self.activation) if self.activation else input
        return functional.linear(input, self.weight.dequantize(), None if self.bias is None else self.bias.float())


class LayerCastPackedConv(PackedConv):
    """A packed convolution, likewise."""

    @in_float32
    def forward(self, input: Tensor) -> Tensor:
        """The convolution of dequantized weights in float32."""
        spatial = len(self.kernel)
        input = self._round(input.float(), -(spatial + 1)) if self.activation else input.float()
        if self.side_padding:
            input = functional.pad(input, self.side_padding, mode=self.padding_mode)
        convolve = functional.conv1d if spatial == 1 else functional.conv2d
        weight, bias = self.weight.numbers().float(), None if self.bias is None else self.bias.float()
        outputs: Tensor = convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return outputs


FLOAT_KINDS: dict[str | None, type[nn.Module]] = {
    "linear": LayerCastLinear, "transformers-conv1d": LayerCastConv1D, "conv1d": LayerCastConv1d,
    "conv2d": LayerCastConv2d, "embedding": LayerCastEmbedding,
}  # fmt: skip
PACKED_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    PackedLinear: LayerCastPackedLinear, PackedConv: LayerCastPackedConv, PackedEmbedding: PackedEmbedding,
}  # fmt: skip


def layercast(model: nn.Module, *, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()) -> nn.Module:
    """The model itself, computing in float32 with weights that stay in 16 bits, or packed as they are.

    Linear layers, convolutions and embeddings keep bfloat16 or float16 weights (wider ones become bfloat16) and cast
    them at each call; layers of a packed model are dequantized at each call. Everything else, layers with a custom
    `forward` included, becomes float32. Ties stay. For inference: cast parameters take no gradient.

    Args:
        model: changed in place.
        include: patterns of the layers' names.
        exclude: patterns of layers that become float32 as a whole.

    Raises:
        MpqError: no layer to cast, or a pattern that matches none.
    """
    classes = {name: cls for name, module in model.named_modules() if name and (cls := _cast_class(module)) is not None}
    if not classes:
        raise MpqError(f"{type(model).__name__} has no linear layer, convolution or embedding to cast")
    left_out = set(match_names(exclude, list(classes)))
    chosen = [name for name in match_names(include, list(classes)) if name not in left_out]
    casts = {id(model.get_submodule(name)): classes[name] for name in chosen}
    # A weight that a layer which is not cast shares becomes float32 with it.
    others = {id(p) for m in model.modules() if id(m) not in casts for p in m._parameters.values() if p is not None}
    modules = [module for module in model.modules() if id(module) in casts]
    layers = {id(m): _cast(m, casts[id(m)]) for m in modules if id(m._parameters.get("weight")) not in others}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in layers:
            model.set_submodule(name, layers[id(module)])
    model.float()
    return model


def _cast_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) in PACKED_KINDS:
        return PACKED_KINDS[type(module)]
    return None if own_code(module) else FLOAT_KINDS.get(layer_kind(module))


def _cast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    for parameter in module._parameters.values() if issubclass(kind, LayerCast) else ():
        if parameter is not None:
            parameter.requires_grad_(False)
            if parameter.dtype not in SHORT:
                parameter.data = parameter.data.to(torch.bfloat16)
    layer = kind.__new__(kind)
    vars(layer).update(vars(module))
    return layer
