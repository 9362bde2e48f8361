"""The compiled CPU kernels: torch.ops.mpq.linear on the "panels" layout.

`MPQ_CPU_LEVEL` (portable, avx2, avxvnni, avx512, amx; on Arm portable, neon) caps the instructions used. Two activation
modes: by default activations become two planes of int8, about 15 bits with a scale for each tile of 128 columns
(unquantized bfloat16 or float32 for 8-bit floats; with AMX, from 8 bfloat16 tokens on, weights may be rounded to
bfloat16). Under the activation format int8-channel (a scheme's "+a:int8-token") they have one plane and a scale for
each token, as in the reference.
"""

import ctypes
import logging
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from mpq.core import libraries
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.kernels import reference
from mpq.kernels.cpu import abi, dispatch, panels
from mpq.kernels.layout import LAYOUTS, Layout, Packed
from mpq.kernels.ops import KERNELS
from mpq.rounding.codes import SCALE_DTYPES, decode_table

LEVELS = (  # in the order of src/levels.c
    ("portable", "neon")
    if platform.machine() in ("aarch64", "arm64")
    else ("portable", "avx2", "avxvnni", "avx512", "amx")
)
SCALE_KINDS = ("fp32", "fp16", "bf16", "e8m0", "e4m3", "ue5m3")  # numbered as in src/abi.h
# By level: gather patches up to this many output positions for each row of the weight, and in all; measured, except for
# neon, which takes avx2's
_PATCH_LIMITS = ((0.06, 4.0), (0.12, 10.0), (0.16, 16.0), (0.4, 160.0), (1.5, math.inf))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Native:
    """The loaded library."""

    library: ctypes.CDLL
    level: int  # index in LEVELS
    parallel: int  # address of PyTorch's own GOMP_parallel, to share its thread pool; 0 without


@lru_cache(maxsize=1)
def native() -> Native | None:
    """The library, or None where the package was installed without a compiler."""
    path = libraries.path_of(libraries.KERNELS)
    if path is None:
        return None
    library = ctypes.CDLL(path)
    abi.declare(library)
    cap = os.environ.get("MPQ_CPU_LEVEL", LEVELS[-1])
    if cap not in LEVELS:
        raise MpqError(f"invalid MPQ_CPU_LEVEL {cap!r}: expected one of {', '.join(LEVELS)}")
    loaded = Native(library, library.mpq_best_level(LEVELS.index(cap)), _torch_parallel())
    dispatch.serve(library, loaded.level, loaded.parallel)
    return loaded


def levels() -> list[int]:
    """The instruction-set levels that run here, as indices in LEVELS; empty without the library."""
    loaded = native()
    return [level for level in range(len(LEVELS)) if loaded and loaded.library.mpq_best_level(level) == level]


def level_name() -> str:
    """The instruction-set level in use: one of LEVELS, or "none"."""
    loaded = native()
    return LEVELS[loaded.level] if loaded else "none"


def _torch_parallel() -> int:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _table(entries: bytes) -> ctypes.Array[ctypes.c_ubyte]:
    return abi.Table(*entries)


@dataclass(frozen=True)
class Plan:
    """Weight metadata passed to C, independent of values."""

    weight: abi.Weight
    kind: int


@lru_cache(maxsize=4096)
def _plan(format_name: str, rows: int, cols: int) -> Plan:
    format = parse_format(format_name)
    cut, levels = panels.cut_of(format, rows, cols), panels.levels_of(format.grid)
    assert levels is not None
    bits = panels.bit_map_of(format.grid)
    scale_bytes = SCALE_DTYPES[format.scale].itemsize
    extras = panels.ROWS * (scale_bytes + format.zero_point)
    panel_bytes = cut.tiles * cut.tile * 8 * format.grid.bits
    panel_bytes += extras if cut.row_scales else extras * cut.tiles * cut.segments + panels.END
    weight = abi.Weight(
        rows, cols, panel_bytes, format.grid.bits, levels.kind, levels.offset,
        cut.group, cut.segment, cut.segments, cut.tiles, SCALE_KINDS.index(format.scale), scale_bytes,
        cut.row_scales, format.zero_point, panels.bf16_terms(format), levels.factor, _table(levels.low),
        _table(levels.high), bits.low_matrix, bits.high_matrix, bits.high_flip, bits.normal_mask,
    )  # fmt: skip
    if loaded := native():
        loaded.library.mpq_know(format_name.encode(), weight)
    return Plan(weight, levels.kind)


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
    """torch.ops.mpq.linear for the panels layout, where `dispatch` does not serve it; as `reference.linear`."""
    loaded = native()
    if loaded is None or not cols or not rows:
        return reference.linear(input, weight, bias, format, rows, cols, layout, activation)
    plan, planes = _plan(format, rows, cols), 2
    if activation == "int8-channel" and plan.kind != panels.TABLE_BF16:
        planes = 1
    elif activation:
        input = reference.quantize_activation(input, activation)
    # Streaming weights evicts PyTorch's code from the cache: each PyTorch call before the product costs 10 us or more.
    x, stride = input, cols
    if x.dtype != torch.float32 and x.dtype != torch.bfloat16:
        x = x.float()
    if not x.is_contiguous():
        x = x.reshape(-1, cols)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if bias is not None and (bias.dtype not in (torch.float32, torch.bfloat16) or bias.stride(0) != 1):
        bias = bias.float().contiguous()
    tokens = input.numel() // cols
    out = torch.empty((*input.shape[:-1], rows), dtype=x.dtype, device="cpu")
    status = loaded.library.mpq_linear(plan.weight, _call(loaded, weight, x, tokens, stride, bias, out, planes))
    if status < 0:
        raise MemoryError("out of memory for the CPU kernel's scratch buffers")
    if status:
        which = torch.empty(tokens, dtype=torch.int8, device="cpu")
        loaded.library.mpq_linear(plan.weight, _call(loaded, weight, x, tokens, stride, bias, out, planes, which))
        rest = (weight, bias, format, rows, cols, layout, activation if planes == 1 else "")
        _redo(out.view(-1, rows), x.reshape(-1, cols), which.bool(), *rest)
    return out if out.dtype == input.dtype else out.to(input.dtype)


def _call(
    loaded: Native, weight: Sequence[Tensor], x: Tensor, tokens: int, stride: int, bias: Tensor | None, out: Tensor,
    planes: int = 2, skipped: Tensor | None = None,
) -> abi.Call:  # fmt: skip
    is_bf16 = x.dtype == torch.bfloat16
    return abi.Call(
        weight[0].data_ptr(), weight[1].data_ptr() if len(weight) > 1 else 0, x.data_ptr(), tokens, stride,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.shape[-1], 0,
        is_bf16, bias is not None and bias.dtype == torch.bfloat16, is_bf16,
        planes, torch.get_num_threads(), loaded.level, 0 if skipped is None else skipped.data_ptr(), loaded.parallel,
    )  # fmt: skip


def prepared(input: Tensor, weight: Sequence[Tensor], out: Tensor, format: str) -> Callable[[], int]:
    """A function that computes the product, (tokens, cols) into (tokens, rows) of one dtype, at each call.

    Python's work is done beforehand, so that only the kernel is timed. The caller keeps the tensors alive. MpqError
    without compiled kernels.
    """
    loaded = native()
    if loaded is None:
        raise MpqError("mpq was installed without its compiled kernels: reinstall it with a C compiler")
    plan = _plan(format, out.shape[-1], input.shape[-1])
    call = _call(loaded, weight, input, len(input), input.stride(0), None, out)
    return partial(loaded.library.mpq_linear, plan.weight, call)


def conv(
    input: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str, rows: int, cols: int, layout: str,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """torch.ops.mpq.conv for the panels layout, by the faster of two methods."""
    size = reference.conv_size(input.shape[2:], kernel, stride, padding, dilation)
    if groups == 1 and _patches_pay(len(input) * math.prod(size), rows):
        return patches(input, weight, bias, format, rows, cols, layout, kernel, stride, padding, dilation)
    matrix = unpacked(weight, format, rows, cols, layout)
    return reference.convolve(input, matrix, bias, kernel, stride, padding, dilation, groups)


def patches(
    input: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str, rows: int, cols: int, layout: str,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """A convolution of one group whose patches are gathered and multiplied by packed weights, 256 at a time."""
    loaded, size = native(), reference.conv_size(input.shape[2:], kernel, stride, padding, dilation)
    arguments = (format, rows, cols, layout, kernel, stride, padding, dilation, 1)
    if loaded is None or min(*input.shape, *size, rows) < 1:
        return reference.conv(input, weight, bias, *arguments)
    x = input if input.dtype in (torch.float32, torch.bfloat16) else input.float()
    if bias is not None and (bias.dtype not in (torch.float32, torch.bfloat16) or bias.stride(0) != 1):
        bias = bias.float().contiguous()
    out = x.new_empty((len(x), *size, rows))
    tokens = out.numel() // rows
    skipped = x.new_empty(tokens, dtype=torch.int8)
    line = 1 if len(kernel) == 1 else x.stride(2)
    pairs = [_pair(values, fill) for values, fill in zip(
        (x.shape[2:], kernel, size, stride, padding, dilation), (1, 1, 1, 1, 0, 1), strict=True
    )]  # fmt: skip
    images = abi.Images(x.shape[1], *pairs, (x.stride(0), x.stride(1), line, x.stride(-1)))
    call = _call(loaded, weight, x, tokens, 0, bias, out, skipped=skipped)
    status = loaded.library.mpq_conv(_plan(format, rows, cols).weight, call, images)
    if status < 0:
        raise MemoryError("out of memory for the CPU kernel's scratch buffers")
    if status:
        again = reference.conv(x, weight, bias, *arguments).movedim(1, -1)
        out = torch.where(skipped.bool().reshape(out.shape[:-1])[..., None], again, out)
    return out.to(input.dtype).movedim(-1, 1)


def unpacked(weight: Sequence[Tensor], format: str, rows: int, cols: int, layout: str) -> Tensor:
    """torch.ops.mpq.dequantize for the panels layout."""
    loaded = native()
    if loaded is None or not rows * cols:
        return reference.dequantize(weight, format, rows, cols, layout)
    out, values = weight[0].new_empty((rows, cols), dtype=torch.float32), decode_table(parse_format(format).grid)
    loaded.library.mpq_dequantize(
        _plan(format, rows, cols).weight, weight[0].data_ptr(), weight[1].data_ptr() if len(weight) > 1 else 0,
        values.data_ptr(), out.data_ptr(), torch.get_num_threads(), loaded.parallel,
    )  # fmt: skip
    return out


def _patches_pay(positions: int, rows: int) -> bool:
    """Whether gathering patches is faster than unpacking the weight for PyTorch's own convolution."""
    loaded = native()
    share, most = _PATCH_LIMITS[loaded.level if loaded else 0]
    return positions <= min(share * rows, most)


def _pair(values: Sequence[int], fill: int) -> tuple[int, int]:
    """(height, width); a single dimension is the width."""
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def _redo(
    out: Tensor, x: Tensor, unfit: Tensor, weight: Sequence[Tensor], bias: Tensor | None,
    format: str, rows: int, cols: int, layout: str, activation: str,
) -> None:  # fmt: skip
    """Compute tokens with NaN, infinities or underflowing numbers by the reference."""
    out[unfit] = reference.linear(x[unfit], weight, bias, format, rows, cols, layout, activation)


def embedding(
    indices: Tensor,
    weight: Sequence[Tensor],
    format: str,
    rows: int,
    cols: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """torch.ops.mpq.embedding for the panels layout: only the rows looked up are unpacked."""
    loaded = native()
    if not indices.numel():
        return indices.new_empty((*indices.shape, cols), dtype=dtype)
    if loaded is None or not cols:
        return reference.embedding(indices, weight, format, rows, cols, layout, dtype)
    out = weight[0].new_empty((*indices.shape, cols), dtype=torch.float32)
    chosen, values = indices.long().contiguous(), decode_table(parse_format(format).grid)
    status = loaded.library.mpq_embedding(
        _plan(format, rows, cols).weight, weight[0].data_ptr(), weight[1].data_ptr() if len(weight) > 1 else 0,
        values.data_ptr(), chosen.data_ptr(), chosen.numel(), out.data_ptr(),
    )  # fmt: skip
    if status:
        raise IndexError(f"embedding index out of range: expected 0 to {rows - 1}")
    return out.to(dtype)


def read(data: Tensor) -> None:
    """Read a contiguous tensor's whole megabytes with PyTorch's threads, at the machine's bandwidth."""
    loaded = native()
    if loaded is None:
        data.sum()
    else:
        loaded.library.mpq_read(data.data_ptr(), data.nbytes, torch.get_num_threads(), loaded.parallel)


@lru_cache(maxsize=256)
def _say_uncompiled(name: str) -> None:
    """Warn once for each format."""
    _log.warning("layers in %s have no compiled kernel and run in plain PyTorch: slower, with equal results", name)


def _suits(packed: Packed, device: torch.device) -> bool:
    if device.type == "cpu" and not packed.format.is_plain:
        _say_uncompiled(packed.format.name)
    fits = device.type == "cpu" and panels.supports(packed.format) and min(packed.shape) > 0
    return fits and native() is not None and panels.is_finite(packed)


LAYOUTS[panels.NAME] = Layout(panels.arrange, panels.restore, panels.names, _suits)
KERNELS["linear", panels.NAME, "cpu"] = linear
KERNELS["conv", panels.NAME, "cpu"] = conv
KERNELS["dequantize", panels.NAME, "cpu"] = unpacked
KERNELS["embedding", panels.NAME, "cpu"] = embedding
