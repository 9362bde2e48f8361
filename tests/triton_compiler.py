"""Ahead-of-time compilation of a Triton product, without a device, for tests."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpq.core.formats import Format
from mpq.kernels.gpu.fragments import fields
from mpq.kernels.gpu.triton.config import Config
from mpq.kernels.gpu.triton.product import product_kernel
from mpq.kernels.gpu.triton.spec import magic_of, spec_of
from mpq.kernels.gpu.triton.stream import stream_kernel

_CODES = {8: "*u8", 4: "*i32", 2: "*i16", 1: "*u8"}
_SCALES = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
_DIVISIBLE = [("tt.divisibility", 16)]
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
MODES = {"int8": "int8", "fp8": "float8e4nv"}


def compile_product(
    format: Format, dtype: torch.dtype, config: Config, capability: int, mode: str = "float", even: bool = True
) -> Any:
    """The kernel for a format, compiled for a compute capability (80, 89, 90): Triton's CompiledKernel.

    Its `asm` holds "ttgir", "ptx" and "cubin"; its `metadata` the shared memory in bytes. Sizes are taken to be
    multiples of 16 and the inputs' columns to lie together, as in most models.
    """
    spec = spec_of(format)
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    codes = [_CODES[width] for width in fields(spec.bits)]
    first, second, third = (codes + codes[:1] * 2)[:3]
    element = {"float": short, "int8": "i8", "fp8": "fp8e4nv"}[mode]
    stream = config.programs > 0
    kernel = stream_kernel if stream else product_kernel
    own = ("waves", "quota", "shared") if stream else ("steps_per_split",)
    signature: dict[str, str] = {
        "inputs": f"*{element}", "input_scale": "*fp32", "first": first, "second": second, "third": third,
        "scale": _SCALES.get(spec.scale, "*u8"), "zeros": "*u8", "tensor_scale": "*fp32", "table": "*fp32",
        "bias": f"*{short}", "out": f"*{short}" if stream or config.split == 1 else "*fp32", "parts": "*fp32",
        **dict.fromkeys(("M", "N", "K", "padded_n", "col_blocks", "input_row"), "i32"),
        "input_col": "constexpr", **dict.fromkeys(("out_row", "steps", *own), "i32"),
    }  # fmt: skip
    constants = {
        "input_col": 1, "SPEC": spec, "MODE": mode, "DTYPE": getattr(triton.language, MODES.get(mode, NAMES[dtype])),
        "MAGIC": magic_of(spec, dtype) if mode == "float" else 0, "HAS_BIAS": True, "INPUT_SCALE": mode != "float",
        "EVEN": even, "EMULATE": False, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k, "SPLIT": config.split,
    }  # fmt: skip
    signature |= dict.fromkeys(set(constants) - {"input_col"}, "constexpr")
    order = {name: place for place, name in enumerate(kernel.arg_names)}
    signature = {name: kind for name, kind in signature.items() if name in order}
    constants = {name: value for name, value in constants.items() if name in order}
    divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    divisible += ["N", "K", "padded_n", "input_row", "out_row"]
    source = ASTSource(kernel, signature, constants, {(order[name],): _DIVISIBLE for name in divisible})
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
