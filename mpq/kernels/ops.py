"""torch.ops.mpq: each op defined once with its schema, shape function, gradient and plain-PyTorch reference.

A weight comes as the tensors of its layout in their fixed order. A backend adds its kernel for a layout and a device
type to `KERNELS`; anything else is computed by the reference, from every layout.

    linear(input (..., cols), weight, bias (rows,) or None, ...) -> (..., rows) in the input's type
    linear_parts: the same for a matrix in several weights of one tensor each, whose rows stand at `places` (rows,) of
        the output, those of the first weight first; `formats` are joined by slashes, `rows` are each weight's
    linear_any, linear_parts_any: always computed through Python, for calls that `mpq.kernels.cpu.dispatch` does not
    handle dequantize(weight, ...) -> (rows, cols) float32 embedding(indices (...), weight, ..., dtype) -> (..., cols)
    conv(input (n, channels, *size), weight, bias or None, ..., kernel, stride, padding, dilation, groups)
        -> (n, rows, *size), channels last in memory; 1 or 2 spatial dimensions, padded with zeros on both sides

`activation` is "" or the name of the format that the input is rounded to first (see `mpq.core.scheme`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input

from mpq.core.errors import MpqError
from mpq.kernels import reference
from mpq.kernels.gpu import backend as gpu
from mpq.kernels.gpu import fragments

_WEIGHT = "str format, int rows, int cols, str layout"
_SPATIAL = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LINEAR = f"(Tensor input, Tensor[] weight, Tensor? bias, {_WEIGHT}, str activation) -> Tensor"
_LINEAR_PARTS = (
    "(Tensor input, Tensor[] weight, Tensor places, Tensor? bias, str formats, int[] rows, int cols, str layout, "
    "str activation) -> Tensor"
)
SCHEMAS = {
    "linear": _LINEAR,
    "linear_any": _LINEAR,
    "linear_parts": _LINEAR_PARTS,
    "linear_parts_any": _LINEAR_PARTS,
    "dequantize": f"(Tensor[] weight, {_WEIGHT}) -> Tensor",
    "conv": f"(Tensor input, Tensor[] weight, Tensor? bias, {_WEIGHT}, {_SPATIAL}) -> Tensor",
    "embedding": f"(Tensor indices, Tensor[] weight, {_WEIGHT}, ScalarType dtype) -> Tensor",
}
# (op, layout, device type) -> a function with the op's signature
KERNELS: dict[tuple[str, str, str], Callable[..., Tensor]] = {
    ("linear", fragments.FRAGMENTS, "cuda"): gpu.linear,
    ("embedding", fragments.FRAGMENTS, "cuda"): gpu.embedding,
}


def check_floats(input: Tensor) -> None:
    """MpqError for inputs that are not float16, bfloat16, float32 or float64."""
    if input.dtype not in FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise MpqError(
            f"invalid input of type {str(input.dtype).removeprefix('torch.')} to a packed layer: expected {names}; "
            "convert it with .float()"
        )


def _linear(
    input: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    format: str,
    rows: int,
    cols: int,
    layout: str,
    activation: str,
) -> Tensor:
    if input.shape[-1:] != (cols,):
        raise MpqError(
            f"invalid input of shape {tuple(input.shape)} to a layer of {cols} columns: expected (..., {cols})"
        )
    kernel = KERNELS.get(("linear", layout, input.device.type), reference.linear)
    return kernel(input, weight, bias, format, rows, cols, layout, activation)


def _linear_parts(
    input: Tensor, weight: Sequence[Tensor], places: Tensor, bias: Tensor | None, formats: str, rows: Sequence[int],
    cols: int, layout: str, activation: str,
) -> Tensor:  # fmt: skip
    signatures = zip(weight, formats.split("/"), rows, strict=True)
    parts = [_linear(input, [one], None, format, count, cols, layout, activation) for one, format, count in signatures]
    joined = torch.cat(parts, -1)
    output = torch.empty_like(joined).index_copy_(-1, places, joined)
    return output if bias is None else output + bias.to(output.dtype)


def _dequantize(weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str) -> Tensor:
    kernel = KERNELS.get(("dequantize", layout, weight[0].device.type), reference.dequantize)
    return kernel(weight, format, rows, cols, layout)


def _embedding(
    indices: Tensor, weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str, dtype: torch.dtype
) -> Tensor:
    kernel = KERNELS.get(("embedding", layout, indices.device.type), reference.embedding)
    return kernel(indices, weight, format, rows, cols, layout, dtype)


def _conv(
    input: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str, rows: int, cols: int, layout: str,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    compute = KERNELS.get(("conv", layout, input.device.type), reference.conv)
    return compute(input, weight, bias, format, rows, cols, layout, kernel, stride, padding, dilation, groups)


def _linear_shape(
    input: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str, rows: int, *rest: Any
) -> Tensor:
    return input.new_empty((*input.shape[:-1], rows))


def _parts_shape(
    input: Tensor, weight: Sequence[Tensor], places: Tensor, bias: Tensor | None, formats: str, rows: Sequence[int],
    *rest: Any,
) -> Tensor:  # fmt: skip
    return input.new_empty((*input.shape[:-1], len(places)))


def _conv_shape(
    input: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str, rows: int, cols: int, layout: str,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    size = reference.conv_size(input.shape[2:], kernel, stride, padding, dilation)
    return input.new_empty((len(input), *size, rows)).movedim(-1, 1)


def _dequantize_shape(weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str) -> Tensor:
    return weight[0].new_empty((rows, cols), dtype=torch.float32)


def _embedding_shape(
    indices: Tensor, weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str, dtype: torch.dtype
) -> Tensor:
    return indices.new_empty((*indices.shape, cols), dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, *signature, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.signature, ctx.bias_type = signature, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Gradients of input and bias: packed weights are constants, and rounding the input counts as the identity."""
    by_input = by_bias = None
    if ctx.needs_input_grad[0]:
        matrix = torch.ops.mpq.dequantize(list(ctx.saved_tensors), *ctx.signature)
        by_input = (gradient.float() @ matrix).to(gradient.dtype)
    if ctx.needs_input_grad[2]:
        by_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_type)
    return by_input, [None] * len(ctx.saved_tensors), by_bias, None, None, None, None, None


def _remember_parts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, places, bias, *signature, _ = inputs
    ctx.save_for_backward(*weight, places)
    ctx.signature, ctx.bias_type = signature, None if bias is None else bias.dtype


def _parts_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """As for linear."""
    by_input = by_bias = None
    *weight, places = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        formats, rows, cols, layout = ctx.signature
        signatures = zip(weight, formats.split("/"), rows, strict=True)
        parts = [torch.ops.mpq.dequantize([one], format, count, cols, layout) for one, format, count in signatures]
        by_input = (gradient.float().index_select(-1, places) @ torch.cat(parts)).to(gradient.dtype)
    if ctx.needs_input_grad[3]:
        by_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_type)
    return by_input, [None] * len(weight), None, by_bias, None, None, None, None, None


def _remember_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, format, rows, cols, layout, *spatial = inputs
    ctx.save_for_backward(*weight)
    ctx.signature, ctx.spatial = (format, rows, cols, layout), spatial
    ctx.shape, ctx.bias_type = input.shape, None if bias is None else bias.dtype


def _conv_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """As for linear, in the forward pass's accumulation type: a shorter one would round the weight."""
    by_input = by_bias = None
    kernel, stride, padding, dilation, groups = ctx.spatial
    if ctx.needs_input_grad[0]:
        kind = reference.type_of_sums(gradient)
        matrix = torch.ops.mpq.dequantize(list(ctx.saved_tensors), *ctx.signature)
        weight = matrix.reshape(len(matrix), -1, *kernel).to(kind)
        find: Callable[..., Tensor] = conv1d_input if len(kernel) == 1 else conv2d_input
        by_input = find(ctx.shape, weight, gradient.to(kind), stride, padding, dilation, groups).to(gradient.dtype)
    if ctx.needs_input_grad[2]:
        by_bias = gradient.transpose(0, 1).flatten(1).sum(1).to(ctx.bias_type)
    return by_input, [None] * len(ctx.saved_tensors), by_bias, *[None] * 9


LIBRARY: Any = torch.library.Library("mpq", "DEF")  # type: ignore[no-untyped-call]
_PARTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (_linear, _linear_shape),
    "linear_any": (_linear, _linear_shape),
    "linear_parts": (_linear_parts, _parts_shape),
    "linear_parts_any": (_linear_parts, _parts_shape),
    "conv": (_conv, _conv_shape),
    "dequantize": (_dequantize, _dequantize_shape),
    "embedding": (_embedding, _embedding_shape),
}
for _name, (_implementation, _shape) in _PARTS.items():
    LIBRARY.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpq::{_name}", _shape, lib=LIBRARY)
torch.library.register_autograd("mpq::linear", _linear_backward, setup_context=_remember, lib=LIBRARY)
torch.library.register_autograd("mpq::linear_parts", _parts_backward, setup_context=_remember_parts, lib=LIBRARY)
torch.library.register_autograd("mpq::conv", _conv_backward, setup_context=_remember_conv, lib=LIBRARY)
gpu.register()
