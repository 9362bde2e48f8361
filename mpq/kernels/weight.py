"""Packed weights: tensors of a layout for kernels, which behave as a dequantized tensor for other code."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

import mpq.kernels.cpu.native  # noqa: F401  (its kernels, and torch.ops.mpq)
from mpq.kernels.layout import ROWS, Packed, best_layout, packed_of, to_layout
from mpq.network.layers import shaped

ABOUT_SHAPE = frozenset({"ndim", "dim", "size", "numel", "nelement", "requires_grad", "is_leaf", "is_floating_point"})
BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
COMPARISONS = ("lt", "le", "gt", "ge")
INDICES = (torch.int32, torch.int64)


# Kernel, stride, padding and dilation, each by direction, and conv groups.
Spatial: TypeAlias = tuple[list[int], list[int], list[int], list[int], int]


class PackedWeight(nn.Module):
    """A packed weight matrix; modules that share a weight share this object.

    Its buffers are the layout's tensors; casts of the model do not change their types. A state dict holds the canonical
    layout. Torch functions, methods, operators and indexing see the dequantized values in the shape and type of the
    original weight; look-ups unpack only the rows they need. Writing to those values has no effect.

    Args:
        packed: the matrix (rows, cols).
        dtype: of the dequantized values.
        shape: of the original weight; the matrix's by default.
        transposed: whether the original weight has the input channels first, as in transformers' Conv1D.
    """

    def __init__(
        self,
        packed: Packed,
        dtype: torch.dtype = torch.float32,
        shape: Sequence[int] | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.transposed = dtype, transposed
        self.shape = torch.Size(shape or packed.shape)
        self._put(packed)

    def _put(self, packed: Packed) -> None:
        self._buffers.clear()
        self._buffers.update(packed.tensors)
        self.format, self.layout = packed.format, packed.layout
        self.rows, self.cols = packed.shape
        self.signature = (packed.format.name, *packed.shape, packed.layout)  # arguments of the ops

    @property
    def tensors(self) -> list[Tensor]:
        """The layout's tensors in their fixed order."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def matrix(self) -> Packed:
        """Format, shape and tensors as one value."""
        return packed_of(self.tensors, self.format, (self.rows, self.cols), self.layout)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.tensors[0].device

    def arrange(self, layout: str | None = None) -> None:
        """Change the layout to the one named, or to the best for the device; MpqError for an unknown name."""
        packed = to_layout(self.matrix(), ROWS)
        self._put(to_layout(packed, layout or best_layout(packed, self.device)))

    def dequantize(self) -> Tensor:
        """The weight matrix, float32 (rows, cols)."""
        matrix: Tensor = torch.ops.mpq.dequantize.default(self.tensors, *self.signature)
        return matrix

    def numbers(self) -> Tensor:
        """The dequantized weight in its own shape and type."""
        return shaped(self.dequantize().to(self.dtype), self.shape, self.transposed)

    def linear(self, input: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
        """The product with the matrix: (..., cols) -> (..., rows), the input rounded to an activation format first."""
        output: Tensor = torch.ops.mpq.linear.default(input, self.tensors, bias, *self.signature, activation)
        return output

    def conv(self, input: Tensor, bias: Tensor | None, spatial: Spatial) -> Tensor:
        """The convolution with the matrix: (n, channels, *size) -> (n, rows, *size)."""
        output: Tensor = torch.ops.mpq.conv.default(input, self.tensors, bias, *self.signature, *spatial)
        return output

    def lookup(self, indices: Tensor) -> Tensor:
        """Rows of the matrix, in the weight's type: (...) -> (..., cols); only those are unpacked."""
        rows: Tensor = torch.ops.mpq.embedding.default(indices, self.tensors, *self.signature, self.dtype)
        return rows

    @property
    def is_matrix(self) -> bool:
        """Whether the weight has the shape of the packed matrix."""
        return not self.transposed and len(self.shape) == 2

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.embedding and _is_lookup(*args, **kwargs):
            return _lookup(*args, **kwargs)
        return func(*map(_numbers, args), **{name: _numbers(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or not hasattr(Tensor, name):
                raise
        if name in ABOUT_SHAPE:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        return getattr(self.numbers(), name)

    def __getitem__(self, index: Any) -> Tensor:
        if self.is_matrix and isinstance(index, Tensor) and index.dtype in INDICES:
            return self.lookup(torch.where(index < 0, index + self.rows, index))
        return self.numbers()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.numbers())

    def __neg__(self) -> Tensor:
        return -self.numbers()

    def extra_repr(self) -> str:
        """Shape, format and layout."""
        return f"{self.rows}, {self.cols}, {self.format.name}, layout={self.layout}"

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


def _numbers(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.numbers()
    if type(value) in (list, tuple):
        return type(value)(map(_numbers, value))
    return value


def _is_lookup(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> bool:
    return isinstance(input, Tensor) and isinstance(weight, PackedWeight) and weight.is_matrix and max_norm is None


def _lookup(input: Tensor, weight: PackedWeight, *_: Any, **__: Any) -> Tensor:
    return weight.lookup(input)


def _behave_as_tensor() -> None:
    """Define operators, which Python looks up in the class, and the casts that modules do in place."""

    def forward(name: str) -> Callable[..., Any]:
        function = getattr(operator, name)
        return lambda self, other: function(self.numbers(), _numbers(other))

    def backward(name: str) -> Callable[..., Any]:
        function = getattr(operator, name)
        return lambda self, other: function(_numbers(other), self.numbers())

    def cast(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(self.numbers(), name)(*args, **kwargs)

    for name in (*BINARY, *COMPARISONS):
        setattr(PackedWeight, f"__{name}__", forward(name))
    for name in BINARY:
        setattr(PackedWeight, f"__r{name}__", backward(name))
    for name in ("to", "float", "double", "half", "bfloat16", "cpu", "cuda", "type"):
        setattr(PackedWeight, name, cast(name))


_behave_as_tensor()
