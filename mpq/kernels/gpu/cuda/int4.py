"""The CUDA C++ product for int4 weights with float16 scales for groups or rows, and small batches: sm_80 and later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.kernels.gpu.cuda.driver import function_of, launch
from mpq.kernels.gpu.cuda.nvrtc import compiled, definitions, source_of
from mpq.kernels.gpu.fragments import BLOCK_COLS, TILE_ROWS, names

FILES = ("instructions.cuh", "decode.cuh", "int4.cu", "shares.cuh")
ROWS, THREADS = 64, 128  # per block
BLOCKS = (8, 16, 32, 64)  # tokens of a block


@dataclass(frozen=True)
class Plan:
    """A launch plan: compile-time constants, grid, and kernel arguments in order."""

    macros: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]  # count, rows, columns, padded, blocks, strides, steps_per_share


def covers(format: Format, tokens: Tensor) -> bool:
    """Whether the kernel supports a weight format and tokens (tokens, cols)."""
    fits = format.grid.family == "int" and format.grid.bits == 4 and format.scale == "fp16" and not format.tensor_scale
    return (
        fits
        and format.group_size % 32 == 0
        and tokens.dtype in (torch.float16, torch.bfloat16)
        and tokens.shape[1] % 8 == 0
        and tokens.stride(1) == 1
        and tokens.stride(0) % 8 == 0
        and tokens.data_ptr() % 16 == 0
    )


def runs_on(device: torch.device) -> bool:
    """Whether the device has these instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def plan(format: Format, tokens: Tensor, rows: int, shares: int, stages: int = 4) -> Plan:
    """The launch plan of a product with `shares` programs for each block of rows."""
    return plan_in_blocks(format, tokens, rows, shares, stages, (ROWS, BLOCKS), tokens.stride(0))


def plan_in_blocks(
    format: Format, tokens: Tensor, rows: int, shares: int, stages: int, sizes: tuple[int, Sequence[int]], *strides: int
) -> Plan:
    """The plan for blocks of `sizes`: the rows, and the first number of tokens that holds all."""
    block_rows, blocks_of_tokens = sizes
    count, cols = tokens.shape
    block = next((size for size in blocks_of_tokens if count <= size), blocks_of_tokens[-1])
    blocks = -(-cols // BLOCK_COLS)
    steps = -(-blocks // min(shares, blocks))
    macros = {
        "TOKENS": block, "GROUP": format.group_size, "ZEROS": int(format.zero_point),
        "BF16": int(tokens.dtype == torch.bfloat16), "STAGES": stages,
    }  # fmt: skip
    grid = (-(-rows // block_rows), -(-blocks // steps), -(-count // block))
    padded = rows + -rows % TILE_ROWS
    return Plan(definitions(macros), grid, (count, rows, cols, padded, blocks, *strides, steps))


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
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled("int4", source_of(FILES), f"sm_{major}{minor}", cut.macros)
    function = function_of(cubin, "product", index_of(device))

    def run(out: Tensor, buffer: Tensor | None) -> None:
        pointers = (tokens, parts["codes4"], parts["scale"], parts.get("zeros"), bias, out, buffer)
        launch(function, cut.grid, THREADS, (*pointers, *cut.numbers), device)

    return with_shares(run, tokens.new_empty((tokens.shape[0], rows)), bias, cut.grid[1], cubin)


def with_shares(
    run: Callable[[Tensor, Tensor | None], None], out: Tensor, bias: Tensor | None, number: int, cubin: bytes
) -> Tensor:
    """Call `run(out, shares)`; with several shares, into a buffer whose sum plus bias is the output."""
    if number == 1:
        run(out, None)
        return out
    shares = out.new_empty((number, *out.shape), dtype=torch.float32)
    run(out, shares)
    arguments = (shares, bias, out, number, out.numel(), out.shape[1])
    grid = (-(-out.numel() // 256), 1, 1)
    launch(function_of(cubin, "add_shares", index_of(out.device)), grid, 256, arguments, out.device)
    return out


def index_of(device: torch.device) -> int:
    """A CUDA device's number."""
    return torch.cuda.current_device() if device.index is None else device.index
