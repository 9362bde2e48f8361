"""The CUDA backend of torch.ops.mpq: fused kernels over the layout "fragments"."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mpq.core.formats import parse_format
from mpq.kernels.gpu import fragments
from mpq.kernels.layout import LAYOUTS, Layout, Packed, packed_of
from mpq.rounding.reference import dequantize


def linear(
    input: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    format: str,
    rows: int,
    cols: int,
    layout: str,
    activation: str,
) -> Tensor:
    """torch.ops.mpq.linear from fragments on a CUDA device; Triton is imported at the first call."""
    from mpq.kernels.gpu.triton.linear import linear as fused

    with torch.cuda.device(input.device):  # Triton launches on the current device
        return fused(input, weight, bias, format, rows, cols, layout, activation)


def embedding(
    indices: Tensor, weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """torch.ops.mpq.embedding from fragments: only the tiles of the picked rows are unpacked."""
    packed = packed_of(weight, parse_format(format), (rows, cols), layout)
    numbers = dequantize(fragments.take_rows(packed, indices.flatten()))
    return numbers.reshape(*indices.shape, cols).to(dtype)


def attend(query: Tensor, *arguments: Any) -> Tensor:
    """torch.ops.mpq.attend on a CUDA device; Triton, where it is installed, is imported at the first call."""
    from mpq.kernels.attention import attend_plainly

    if find_spec("triton") is None:
        return attend_plainly(query, *arguments)
    from mpq.kernels.gpu.triton.attend import attend as fused

    with torch.cuda.device(query.device):
        return fused(query, *arguments)


def suits(packed: Packed, device: torch.device) -> bool:
    """Whether to compute in fragments: a CUDA device, a supported format, and Triton installed."""
    return device.type == "cuda" and fragments.covers(packed.format) and find_spec("triton") is not None


def register() -> None:
    """Add the layout to `LAYOUTS`."""
    LAYOUTS[fragments.FRAGMENTS] = Layout(fragments.arrange, fragments.restore, fragments.names, suits)
