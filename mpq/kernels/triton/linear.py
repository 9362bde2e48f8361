"""torch.ops.mpq.linear on Triton: what it covers, choosing blocks, launching."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.core.formats import Format, parse_format
from mpq.core.rounding import decode_table
from mpq.kernels import reference
from mpq.kernels.fragments import TILE_ROWS, covers, fields, names
from mpq.kernels.triton.config import Config, default_config
from mpq.kernels.triton.product import product_kernel, reduce_kernel
from mpq.kernels.triton.spec import magic_of, spec_of

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
EMULATE = bool(triton.knobs.runtime.interpret)


def linear(
    input: Tensor,  # (..., cols), fp16 or bf16, any strides
    weight: Sequence[Tensor],  # layout "fragments"
    bias: Tensor | None,  # (rows,)
    format: str,
    rows: int,
    cols: int,
    layout: str,
    activation: str,
) -> Tensor:
    """input @ weight.T + bias in the input's type, accumulated in float32; the reference where no kernel applies."""
    packed_format = parse_format(format)
    tokens = input.reshape(-1, cols)
    if not computes(packed_format, input.dtype) or 0 in (tokens.shape[0], rows, cols):
        return reference.linear(input, weight, bias, format, rows, cols, layout, activation)
    if activation:
        tokens = reference.quantize_activation(tokens, activation)
    config = default_config(spec_of(packed_format), tokens.shape[0], rows, cols, processors(input.device))
    return product(tokens, weight, bias, packed_format, rows, config).reshape(*input.shape[:-1], rows)


def product(
    tokens: Tensor,  # (tokens, cols)
    weight: Sequence[Tensor],
    bias: Tensor | None,
    format: Format,
    rows: int,
    config: Config,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One launch of the kernel, two when programs share a row: (tokens, rows), by default in the tokens' type."""
    spec, dtype = spec_of(format), tokens.dtype
    count, cols = tokens.shape
    parts = dict(zip(names(format), weight, strict=True))
    codes = [parts[f"codes{width}"] for width in fields(format.grid.bits)]
    first, second, third = (codes + codes[:1] * 2)[:3]
    table = decode_table(format.grid, tokens.device) if spec.kind == "table" else first
    out = tokens.new_empty((count, rows), dtype=out_dtype or dtype)
    steps = -(-cols // config.block_k)
    split = min(config.split, steps)
    target = out if split == 1 else out.new_empty((split, count, rows), dtype=torch.float32)
    padded = first.shape[0] * TILE_ROWS
    even = cols % config.block_k == 0 and padded % config.block_n == 0
    grid = (-(-rows // config.block_n) * -(-count // config.block_m), split)
    product_kernel[grid](
        tokens, tokens, first, second, third, parts["scale"], parts.get("zeros", first),
        parts.get("tensor_scale", first), table, first if bias is None else bias, target,
        count, rows, cols, padded, first.shape[1], tokens.stride(0), tokens.stride(1), rows, -(-steps // split),
        SPEC=spec, MODE="float", DTYPE=TYPES[dtype], MAGIC=magic_of(spec, dtype),
        HAS_BIAS=bias is not None, INPUT_SCALE=False, EVEN=even, EMULATE=EMULATE,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SPLIT=split,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_kernel[(-(-out.numel() // 1024),)](
            target, first if bias is None else bias, out, out.numel(), rows,
            HAS_BIAS=bias is not None, SPLIT=split, BLOCK=1024,
        )  # fmt: skip
    return out


def computes(format: Format, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a format and inputs of a type: 16-bit floats whose range holds the format's numbers."""
    if dtype not in TYPES or not covers(format):
        return False
    return dtype == torch.bfloat16 or format.grid.max <= torch.finfo(torch.float16).max


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
