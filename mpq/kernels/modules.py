"""Layers that hold packed weights and compute from them through torch.ops.mpq."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mpq.kernels.cpu.native  # noqa: F401  (its kernels, and torch.ops.mpq)
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.scheme import Scheme
from mpq.kernels.layout import ROWS, Packed, best_layout, packed_of, tensor_specs, to_layout
from mpq.kernels.reference import quantize_activation
from mpq.kernels.stacked import Stack
from mpq.rounding.activations import straight_through


class PackedWeight(nn.Module):
    """A weight matrix in some layout; modules that share a weight share this module.

    Its buffers are the layout's tensors. They keep their types whatever the model is cast to. A state dict always holds
    the canonical layout.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype  # of the numbers it gives to a model
        self._put(packed)

    def _put(self, packed: Packed) -> None:
        self._buffers.clear()
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.format, self.shape, self.layout = packed.format, packed.shape, packed.layout
        self.facts = (packed.format.name, *packed.shape, packed.layout)  # as the ops take them

    @property
    def tensors(self) -> list[Tensor]:
        """The layout's tensors in their fixed order."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def matrix(self) -> Packed:
        """Format, shape and tensors as one value."""
        return packed_of(self.tensors, self.format, self.shape, self.layout)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    def arrange(self, layout: str | None = None) -> None:
        """Change the layout: to the one named, or to the best for the device; MpqError for an unknown name."""
        packed = to_layout(self.matrix(), ROWS)
        self._put(to_layout(packed, layout or best_layout(packed, self.device)))

    def dequantize(self) -> Tensor:
        """The weight matrix, float32 (rows, cols)."""
        matrix: Tensor = torch.ops.mpq.dequantize.default(self.tensors, *self.facts)
        return matrix

    def extra_repr(self) -> str:
        """Shape, format and layout."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.format.name}, layout={self.layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(iter(kept.values())).device)).dtype  # type: ignore[union-attr]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in to_layout(self.matrix(), ROWS).tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        layout = self.layout
        self._put(to_layout(self.matrix(), ROWS))
        super()._load_from_state_dict(state, prefix, *args)
        self.arrange(layout)


def empty_weight(
    format: Format,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> PackedWeight:
    """A weight to load a state dict into: its tensors have shapes and types, and zeros for content."""
    specs = tensor_specs(format, rows, cols)
    tensors = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in specs.items()}
    return PackedWeight(Packed(format, (rows, cols), ROWS, tensors), dtype)


class PackedLinear(nn.Module):
    """y = x @ weight.T + bias, for nn.Linear and transformers' Conv1D."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None, activation: str = "") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.activation = weight, activation
        self.bias = bias
        self.stack: Stack | None = None  # of layers that share their inputs

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.stack is not None and (part := self.stack.output(self, input)) is not None:
            return part
        weight = self.weight
        output: Tensor = torch.ops.mpq.linear.default(input, weight.tensors, self.bias, *weight.facts, self.activation)
        return output

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
        sides = list(origin._reversed_padding_repeated_twice)  # of the last dimension first
        self.padding_mode = "constant" if origin.padding_mode == "zeros" else origin.padding_mode
        alike = sides[0::2] == sides[1::2] and self.padding_mode == "constant"
        self.padding = sides[::-2] if alike else [0] * len(self.kernel)
        self.side_padding = [] if alike else sides  # added before

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, length) or (batch, channels, height, width), batched or not."""
        spatial = len(self.kernel)
        if input.dim() == spatial + 1:
            return self.forward(input[None])[0]
        if self.activation:
            input = straight_through(input, lambda values: self._round(values, -(spatial + 1)))
        if self.side_padding:
            input = functional.pad(input, self.side_padding, mode=self.padding_mode)
        weight, where = self.weight, (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = torch.ops.mpq.conv.default(input, weight.tensors, self.bias, *weight.facts, *where)
        return output

    def _round(self, input: Tensor, channels: int) -> Tensor:
        return quantize_activation(input.movedim(channels, -1), self.activation).movedim(-1, channels)


class PackedEmbedding(nn.Module):
    """Rows of a packed table; only those looked up are unpacked."""

    def __init__(self, weight: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        rows: Tensor = torch.ops.mpq.embedding.default(
            input, self.weight.tensors, *self.weight.facts, self.weight.dtype
        )
        return rows


def packed_module(origin: nn.Module, weight: PackedWeight, scheme: Scheme) -> nn.Module:
    """The packed module that takes the place of `origin`."""
    activation = "" if scheme.activation is None else scheme.activation.name
    if isinstance(origin, nn.Embedding):
        if origin.max_norm is not None:
            raise MpqError("an embedding with max_norm changes its weight while it runs and cannot be packed")
        packed: nn.Module = PackedEmbedding(weight, origin.padding_idx)
    elif isinstance(origin, (nn.Conv1d, nn.Conv2d)):
        packed = PackedConv(weight, origin, activation)
    else:
        bias: Tensor | None = origin.bias  # type: ignore[assignment]
        packed = PackedLinear(weight, bias, activation)
    return packed.train(origin.training)
