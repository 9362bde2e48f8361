"""The CUDA C++ product for int4 weights on sm_90a, for batches of 16 and more: wgmma, bulk and tensor copies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.kernels.gpu.cuda import int4
from mpq.kernels.gpu.cuda.driver import function_of, launch, tensor_map
from mpq.kernels.gpu.cuda.int4 import Plan, index_of, plan_in_blocks, with_shares
from mpq.kernels.gpu.cuda.nvrtc import compiled, source_of
from mpq.kernels.gpu.fragments import BLOCK_COLS, names

FILES = ("instructions.cuh", "decode.cuh", "hopper.cuh", "hopper.cu", "shares.cuh")
ARCHITECTURE = "sm_90a"
ROWS, THREADS = 128, 288  # per block
BLOCKS = (16, 32, 64, 128)  # tokens of a block


def covers(format: Format, tokens: Tensor) -> bool:
    """Whether the kernel supports a weight format and tokens (tokens, cols); the same as `int4`."""
    return int4.covers(format, tokens)


def runs_on(device: torch.device) -> bool:
    """Whether the device has these instructions: compute capability 9.0 only."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def plan(format: Format, tokens: Tensor, rows: int, shares: int, stages: int = 8) -> Plan:
    """The launch plan of a product with `shares` programs for each block of rows."""
    return plan_in_blocks(format, tokens, rows, shares, stages, (ROWS, BLOCKS))


def shared_bytes(macros: tuple[tuple[str, int], ...]) -> int:
    """Bytes of dynamic shared memory: stages of tokens and codes, and alignment."""
    values = dict(macros)
    return values["STAGES"] * (values["TOKENS"] * 2 * BLOCK_COLS + ROWS * BLOCK_COLS // 2) + 1024


def instruction(tokens: int, bf16: bool) -> str:
    """C++ text of `multiply_async`: sums (64 x tokens) += or = left (64 x 16) right (16 x tokens).

    PTX ISA, wgmma.mma_async.m64nNk16 with the left operand in registers; the right one is K-major.
    """
    kind, count = "bf16" if bf16 else "f16", tokens // 2
    sums = ", ".join(f"%{place}" for place in range(count))
    left = ", ".join(f"%{count + place}" for place in range(4))
    outputs = ", ".join(f'"+f"(sums[{place}])' for place in range(count))
    return f"""
__device__ __forceinline__ void multiply_async(float (&sums)[{count}], const u32 (&left)[4], u64 right, bool add) {{
    asm volatile(
        "{{\\n\\t.reg .pred add;\\n\\tsetp.ne.b32 add, %{count + 5}, 0;\\n\\t"
        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} "
        "{{{sums}}}, {{{left}}}, %{count + 4}, add, 1, 1, 0;\\n\\t}}"
        : {outputs}
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(static_cast<int>(add)));
}}
"""


def source(macros: tuple[tuple[str, int], ...]) -> str:
    """The kernel's whole text."""
    values = dict(macros)
    return source_of(FILES[:3]) + instruction(values["TOKENS"], bool(values["BF16"])) + source_of(FILES[3:])


def product(
    tokens: Tensor,  # (tokens, cols) on a CUDA device
    weight: Sequence[Tensor],  # layout "fragments"
    bias: Tensor | None,  # (rows,) of the tokens' type
    format: Format,
    rows: int,
    shares: int = 1,
) -> Tensor:
    """tokens @ weight.T + bias, (tokens, rows) in the tokens' type. Asynchronous; compiles at first use."""
    parts, device = dict(zip(names(format), weight, strict=True)), tokens.device
    cut = plan(format, tokens, rows, shares)
    cubin, shared = compiled("hopper", source(cut.macros), ARCHITECTURE, cut.macros), shared_bytes(cut.macros)
    function = function_of(cubin, "product", index_of(device), shared)
    inputs = tensor_map(tokens, (dict(cut.macros)["TOKENS"], BLOCK_COLS))

    def run(out: Tensor, buffer: Tensor | None) -> None:
        pointers = (inputs, parts["codes4"], parts["scale"], parts.get("zeros"), bias, out, buffer)
        launch(function, cut.grid, THREADS, (*pointers, *cut.numbers), device, shared)

    return with_shares(run, tokens.new_empty((tokens.shape[0], rows)), bias, cut.grid[1], cubin)
