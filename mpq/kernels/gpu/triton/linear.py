"""torch.ops.mpq.linear on Triton: supported formats, choice of blocks, launches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.core.formats import Format, parse_format
from mpq.kernels import reference
from mpq.kernels.gpu.cuda.verification import kernel_for
from mpq.kernels.gpu.fragments import BLOCK_COLS, TILE_ROWS, covers, fields, names
from mpq.kernels.gpu.triton.config import Config, default_config, step_cols
from mpq.kernels.gpu.triton.inputs import round_kernel
from mpq.kernels.gpu.triton.product import product_kernel, reduce_kernel
from mpq.kernels.gpu.triton.spec import magic_of, spec_of
from mpq.kernels.gpu.triton.stream import Stream, join_kernel, stream_kernel
from mpq.kernels.gpu.triton.tables import config_for, device_facts
from mpq.rounding.codes import decode, decode_table, encode, to_float_copy
from mpq.rounding.reference import absmax_scales, from_groups, to_groups

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
MODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
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
    """input @ weight.T + bias in the input's type, accumulated in float32 or int32; the reference where no kernel
    applies. Asynchronous.
    """
    packed = parse_format(format)
    tokens = input.reshape(-1, cols)
    if not computes(packed, input.dtype) or 0 in (tokens.shape[0], rows, cols):
        return reference.linear(input, weight, bias, format, rows, cols, layout, activation)
    config = config_for(packed.name, activation, tokens.shape[0], rows, cols, input.device)
    return compute(tokens, weight, bias, packed, rows, config, activation).reshape(*input.shape[:-1], rows)


def compute(
    tokens: Tensor,  # (tokens, cols), fp16 or bf16
    weight: Sequence[Tensor],
    bias: Tensor | None,
    format: Format,
    rows: int,
    config: Config,
    activation: str = "",
) -> Tensor:
    """The product with the blocks of `config`, tokens first rounded to `activation`: (tokens, rows) in their type."""
    if not activation:
        if config.backend != "triton":
            kernel = kernel_for(config.backend, format, tokens)
            if kernel is not None:
                bias = None if bias is None else bias.to(tokens.dtype).contiguous()
                output: Tensor = kernel.product(tokens, weight, bias, format, rows, config.split)
                return output
            _, processors = device_facts(tokens.device)
            config = default_config(spec_of(format), tokens.shape[0], rows, tokens.shape[1], processors)
        return product(tokens, weight, bias, format, rows, config, tokens.dtype)
    rounded = parse_format(activation)
    dtype = eight_bits(format, rounded, tokens.device)
    if dtype is None:
        return product(rounded_inputs(tokens, rounded), weight, bias, format, rows, config, tokens.dtype)
    codes, scales = eight_bit_inputs(tokens, rounded, dtype)
    wide = replace(config, block_k=max(32, config.block_k))
    return product(codes, weight, bias, format, rows, wide, tokens.dtype, scales)


def product(
    tokens: Tensor,  # (tokens, cols); int8 or fp8 from `eight_bit_inputs`
    weight: Sequence[Tensor],
    bias: Tensor | None,
    format: Format,
    rows: int,
    config: Config,
    out_dtype: torch.dtype,
    scales: Tensor | None = None,  # float32 (tokens,), of 8-bit tokens
) -> Tensor:
    """One launch of the kernel, two when programs share a block: (tokens, rows)."""
    spec, dtype = spec_of(format), tokens.dtype
    count, cols = tokens.shape
    parts = dict(zip(names(format), weight, strict=True))
    codes = [parts[f"codes{width}"] for width in fields(format.grid.bits)]
    first, second, third = (codes + codes[:1] * 2)[:3]
    table = decode_table(format.grid, tokens.device) if spec.kind == "table" else first
    out = tokens.new_empty((count, rows), dtype=out_dtype)
    grouped = parts["scale"].shape[0] * spec.group if spec.group else cols  # 8-bit tokens may be padded beyond it
    steps = -(-min(cols, grouped) // config.block_k)
    padded = first.shape[0] * TILE_ROWS
    blocks = -(-rows // config.block_n) * -(-count // config.block_m)
    operands = (
        tokens, tokens if scales is None else scales, first, second, third, parts["scale"], parts.get("zeros", first),
        parts.get("tensor_scale", first), table, first if bias is None else bias,
    )  # fmt: skip
    sizes = (count, rows, cols, padded, first.shape[1], tokens.stride(0), tokens.stride(1), rows)
    fixed: dict[str, Any] = {
        "SPEC": spec, "MODE": MODES.get(dtype, "float"), "DTYPE": TYPES[dtype], "MAGIC": magic_of(spec, dtype),
        "HAS_BIAS": bias is not None, "INPUT_SCALE": scales is not None, "EMULATE": EMULATE,
        "EVEN": cols % config.block_k == 0 and padded % config.block_n == 0,
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    if config.programs:
        _stream(operands, out, sizes, fixed, Stream(min(config.programs, blocks * steps), blocks, steps))
    else:
        _share(operands, out, sizes, fixed, blocks, steps, min(config.split, steps))
    return out


def _share(
    operands: tuple[Tensor, ...], out: Tensor, sizes: tuple[int, ...], fixed: dict[str, Any],
    blocks: int, steps: int, split: int,
) -> None:  # fmt: skip
    """A program for each block, or `split` of them, whose sums a second launch adds."""
    target = out if split == 1 else out.new_empty((split, *out.shape), dtype=torch.float32)
    product_kernel[(blocks, split)](*operands, target, *sizes, steps, -(-steps // split), SPLIT=split, **fixed)
    if split > 1:
        reduce_kernel[(-(-out.numel() // 1024),)](
            target, operands[-1], out, out.numel(), out.shape[1],
            HAS_BIAS=fixed["HAS_BIAS"], SPLIT=split, BLOCK=1024,
        )  # fmt: skip


def _stream(
    operands: tuple[Tensor, ...], out: Tensor, sizes: tuple[int, ...], fixed: dict[str, Any], cut: Stream
) -> None:
    """Persistent programs, and a second launch for the blocks that they share."""
    block_n, block_m = fixed["BLOCK_N"], fixed["BLOCK_M"]
    parts = out.new_empty((cut.programs, 2, block_n, block_m) if cut.shared else 1, dtype=torch.float32)
    stream_kernel[(cut.programs,)](*operands, out, parts, *sizes, cut.steps, cut.waves, cut.quota, cut.shared, **fixed)
    if cut.shared:
        join_kernel[(cut.shared, block_n // TILE_ROWS)](
            parts, operands[-1], out, out.shape[0], out.shape[1], out.shape[1], cut.steps, cut.quota,
            cut.waves * cut.programs, HAS_BIAS=fixed["HAS_BIAS"], BLOCK_N=block_n, BLOCK_M=block_m, ROWS=TILE_ROWS,
        )  # fmt: skip


def computes(format: Format, dtype: torch.dtype) -> bool:
    """Whether the kernel supports a format and an input type: 16-bit floats whose range holds the format's values."""
    if dtype not in (torch.float16, torch.bfloat16) or not covers(format):
        return False
    return dtype == torch.bfloat16 or format.grid.max <= torch.finfo(torch.float16).max


def eight_bits(weight: Format, activation: Format, device: torch.device) -> torch.dtype | None:
    """The 8-bit type whose matrix instructions multiply both formats exactly, or None.

    int8: integers with zero points of at most 7 bits, groups that hold whole steps. float8_e4m3fn: e4m3 on both sides,
    from compute capability 8.9 on. One scale for each token or for all.
    """
    if activation.granularity == "group" or (
        weight.granularity == "group" and weight.group_size % step_cols(spec_of(weight))
    ):
        return None
    if weight.grid.family == activation.grid.family == "int" and activation.grid.signed:
        return torch.int8 if weight.grid.bits < 8 or weight.grid.signed else None
    recent = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if weight.grid.name == activation.grid.name == "e4m3" and recent else None


def eight_bit_inputs(tokens: Tensor, format: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (tokens, cols filled up to 64) in lane order, and float32 scales (tokens,), by the format's own rules."""
    count, cols = tokens.shape
    codes = tokens.new_empty((count, cols + -cols % BLOCK_COLS), dtype=dtype)
    whole = format.granularity == "tensor" or format.scale not in ("fp16", "fp32")
    if whole:
        scales = absmax_scales(tokens.float(), format)[0].reshape(-1).expand(count).contiguous()
    else:
        scales = tokens.new_empty(count, dtype=torch.float32)
    round_kernel[(count,)](
        tokens, scales, codes, cols, codes.shape[1], tokens.stride(0), tokens.stride(1),
        LIMIT=format.grid.max, LOW=format.grid.min, HALF=format.scale == "fp16", SHARED=whole, BLOCK=1024,
    )  # fmt: skip
    return codes, scales


def rounded_inputs(tokens: Tensor, format: Format) -> Tensor:
    """`reference.quantize_activation` without its checks, which would wait for the device."""
    if format.is_float_copy:
        return to_float_copy(tokens, format.grid.name).to(tokens.dtype)
    scales = absmax_scales(tokens.float(), format)[0].unsqueeze(-1)
    elements = decode(encode(to_groups(tokens.float(), format) / scales, format.grid), format.grid) * scales
    return from_groups(elements, format, (tokens.shape[0], tokens.shape[1])).to(tokens.dtype)
