"""Layers that hold packed weights and compute from them through torch.ops.mpq."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.scheme import Scheme
from mpq.kernels.ops import check_floats
from mpq.kernels.reference import quantize_activation
from mpq.kernels.stacked import Stack
from mpq.kernels.weight import PackedWeight
from mpq.rounding.activations import straight_through


def floats(input: Tensor) -> Tensor:
    """The input of a packed layer, in the type of `torch.autocast` inside it; MpqError for integers."""
    check_floats(input)
    kind = input.device.type
    return input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input


class PackedLinear(nn.Module):
    """y = x @ weight.T + bias, for nn.Linear and transformers' Conv1D."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None, activation: str = "") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.rows, weight.cols
        self.weight, self.activation = weight, activation
        self.bias = bias
        self.stack: Stack | None = None  # shared with layers of the same input

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        input = floats(input)
        if self.stack is not None and (part := self.stack.output(self, input)) is not None:
            return part
        return self.weight.linear(input, self.bias, self.activation)

    def extra_repr(self) -> str:
        """The activation's format, if any."""
        return f"activation={self.activation}" if self.activation else ""


class PackedConv(nn.Module):
    """nn.Conv1d or nn.Conv2d, grouped or not."""

    def __init__(self, weight: PackedWeight, origin: nn.Conv1d | nn.Conv2d, activation: str = "") -> None:
        super().__init__()
        self.weight, self.activation = weight, activation
        self.bias = origin.bias
        self.kernel, self.stride = list(origin.kernel_size), list(origin.stride)
        self.dilation, self.groups = list(origin.dilation), origin.groups
        sides = list(origin._reversed_padding_repeated_twice)  # last dimension first
        self.padding_mode = "constant" if origin.padding_mode == "zeros" else origin.padding_mode
        alike = sides[0::2] == sides[1::2] and self.padding_mode == "constant"
        self.padding = sides[::-2] if alike else [0] * len(self.kernel)
        self.side_padding = [] if alike else sides  # padded explicitly before the convolution

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, length) or (batch, channels, height, width), batched or not."""
        input = floats(input)
        spatial = len(self.kernel)
        if input.dim() == spatial + 1:
            return self.forward(input[None])[0]
        if self.activation:
            input = straight_through(input, lambda values: self._round(values, -(spatial + 1)))
        if self.side_padding:
            input = functional.pad(input, self.side_padding, mode=self.padding_mode)
        where = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        return self.weight.conv(input, self.bias, where)

    def _round(self, input: Tensor, channels: int) -> Tensor:
        return quantize_activation(input.movedim(channels, -1), self.activation).movedim(-1, channels)


class PackedEmbedding(nn.Module):
    """An embedding with packed rows; only rows looked up are unpacked."""

    def __init__(self, weight: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.num_embeddings, self.embedding_dim = weight.rows, weight.cols

    def forward(self, input: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        return self.weight.lookup(input)


def packed_module(origin: nn.Module, weight: PackedWeight, scheme: Scheme) -> nn.Module:
    """The packed replacement of `origin`."""
    activation = "" if scheme.activation is None else scheme.activation.name
    if isinstance(origin, nn.Embedding):
        packed: nn.Module = PackedEmbedding(weight, origin.padding_idx)
    elif isinstance(origin, (nn.Conv1d, nn.Conv2d)):
        packed = PackedConv(weight, origin, activation)
    else:
        bias: Tensor | None = origin.bias  # type: ignore[assignment]
        packed = PackedLinear(weight, bias, activation)
    packed._forward_pre_hooks.update(origin._forward_pre_hooks)  # keep the users' hooks
    packed._forward_pre_hooks_with_kwargs.update(origin._forward_pre_hooks_with_kwargs)
    packed._forward_hooks.update(origin._forward_hooks)
    packed._forward_hooks_with_kwargs.update(origin._forward_hooks_with_kwargs)
    packed._forward_hooks_always_called.update(origin._forward_hooks_always_called)
    return packed.train(origin.training)
