"""The CUDA C++ product for int4 weights with float16 scales for groups or rows, and small batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.kernels.cuda.driver import function_of, launch
from mpq.kernels.cuda.nvrtc import compiled, definitions
from mpq.kernels.fragments import BLOCK_COLS, TILE_ROWS, names

SOURCE = "int4.cu"
ROWS, THREADS = 64, 128  # of a block
MOST_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """What is fixed when compiling, the grid, and the kernel's numbers in their order."""

    macros: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]  # count, rows, columns, padded, blocks, stride, steps_per_share


def covers(format: Format, tokens: Tensor) -> bool:
    """Whether the kernel takes a weight format and tokens (tokens, cols)."""
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


def plan(format: Format, tokens: Tensor, rows: int, shares: int, stages: int = 4) -> Plan:
    """How a product with `shares` programs for each block of rows is cut."""
    count, cols = tokens.shape
    block = next((size for size in (8, 16, 32) if count <= size), MOST_TOKENS)
    blocks = -(-cols // BLOCK_COLS)
    steps = -(-blocks // min(shares, blocks))
    macros = {
        "TOKENS": block, "GROUP": format.group_size, "ZEROS": int(format.zero_point),
        "BF16": int(tokens.dtype == torch.bfloat16), "STAGES": stages,
    }  # fmt: skip
    grid = (-(-rows // ROWS), -(-blocks // steps), -(-count // block))
    padded = rows + -rows % TILE_ROWS
    return Plan(definitions(macros), grid, (count, rows, cols, padded, blocks, tokens.stride(0), steps))


def product(
    tokens: Tensor,  # (tokens, cols) on a CUDA device
    weight: Sequence[Tensor],  # layout "fragments"
    bias: Tensor | None,  # (rows,) of the tokens' type
    format: Format,
    rows: int,
    shares: int = 1,
) -> Tensor:
    """tokens @ weight.T + bias, (tokens, rows) in the tokens' type. Compiles at first use; waits for nothing after."""
    parts, device = dict(zip(names(format), weight, strict=True)), tokens.device
    cut = plan(format, tokens, rows, shares)
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled(SOURCE, f"sm_{major}{minor}", cut.macros)
    index = torch.cuda.current_device() if device.index is None else device.index
    out = tokens.new_empty((tokens.shape[0], rows))
    number = cut.grid[1]
    buffer = out.new_empty((number, *out.shape), dtype=torch.float32) if number > 1 else None
    pointers = (tokens, parts["codes4"], parts["scale"], parts.get("zeros"), bias, out, buffer)
    launch(function_of(cubin, "product", index), cut.grid, THREADS, (*pointers, *cut.numbers), device)
    if buffer is not None:
        arguments = (buffer, bias, out, number, out.numel(), rows)
        launch(function_of(cubin, "add_shares", index), (-(-out.numel() // 256), 1, 1), 256, arguments, device)
    return out
