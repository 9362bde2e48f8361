"""The reference in plain PyTorch, which every kernel must equal: unpack, dequantize, multiply in float32."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.formats import parse_format
from mpq.kernels.layout import packed_of, take_rows, unpack
from mpq.rounding.reference import dequantize as dequantize_codes
from mpq.rounding.reference import fake_quantize


def linear(
    input: Tensor,  # (..., cols)
    weight: Sequence[Tensor],
    bias: Tensor | None,  # (rows,)
    format: str,
    rows: int,
    cols: int,
    layout: str,
    activation: str,
) -> Tensor:
    """input @ weight.T + bias, computed in float32, in the input's type: (..., rows)."""
    matrix = dequantize(weight, format, rows, cols, layout)
    if activation:
        input = quantize_activation(input, activation)
    output = functional.linear(input.float(), matrix, None if bias is None else bias.float())
    return output.to(input.dtype)


def conv(
    input: Tensor,  # (n, channels, *size)
    weight: Sequence[Tensor],
    bias: Tensor | None,  # (rows,)
    format: str,
    rows: int,
    cols: int,
    layout: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution in one or two dimensions, in the input's type: (n, rows, *size), channels last in memory."""
    matrix = dequantize(weight, format, rows, cols, layout)
    return convolve(input, matrix, bias, kernel, stride, padding, dilation, groups)


def convolve(
    input: Tensor,
    matrix: Tensor,  # float32 (rows, cols)
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv` by an unpacked weight; 16-bit types are computed in float32 on a CPU.

    PyTorch 2.13 computes bfloat16 convolutions with oneDNN, whose AMX kernel (brg_conv_fwd) reads uninitialized memory
    when only the width has a stride and the output is narrow: conv2d of ones (1, 2, 8, 3) and (1, 2, 3, 3), stride
    (1, 2), is not 18 everywhere. float32 is correct.
    """
    kind = type_of_sums(input)
    whole = matrix.reshape(len(matrix), -1, *kernel).to(kind)
    function: Callable[..., Tensor] = functional.conv1d if len(kernel) == 1 else functional.conv2d
    bias = None if bias is None else bias.to(kind)
    output = function(input.to(kind), whole, bias, stride, padding, dilation, groups).to(input.dtype)
    return output.movedim(1, -1).contiguous().movedim(-1, 1)


def type_of_sums(input: Tensor) -> torch.dtype:
    """The type that convolutions of `input` are computed in: on a CPU no shorter than float32."""
    return torch.promote_types(input.dtype, torch.float32) if input.device.type == "cpu" else input.dtype


def conv_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Output positions of a convolution in each dimension."""
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(length + 2 * around - apart * (taps - 1) - 1) // step + 1 for length, taps, step, around, apart in sides]


def quantize_activation(input: Tensor, activation: str) -> Tensor:
    """The input (..., cols) as the activation format holds it, in its own type; rows are tokens.

    A token with NaN or infinities has no finite scale and becomes NaN.
    """
    tokens = input.reshape(-1, input.shape[-1])
    fit = tokens.isfinite().all(-1, keepdim=True)
    rounded = fake_quantize(tokens.where(fit, 0), parse_format(activation)).where(fit, torch.nan)
    return rounded.reshape(input.shape).to(input.dtype)


def dequantize(weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str) -> Tensor:
    """The weight, float32 (rows, cols)."""
    return dequantize_codes(unpack(packed_of(weight, parse_format(format), (rows, cols), layout)))


def embedding(
    indices: Tensor,  # int (...)
    weight: Sequence[Tensor],
    format: str,
    rows: int,
    cols: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """The rows that the indices pick: (..., cols)."""
    packed = take_rows(packed_of(weight, parse_format(format), (rows, cols), layout), indices.flatten())
    return dequantize_codes(unpack(packed)).reshape(*indices.shape, cols).to(dtype)
