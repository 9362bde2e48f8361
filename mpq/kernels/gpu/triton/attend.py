"""torch.ops.mpq.attend on a CUDA device: keys and values from blocks of 64 tokens, split over the sequence.

Untried on a device: interpreted and compiled in tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mpq.core.cache import TokenBlocks, parse_cache_format
from mpq.kernels import blocks, reference
from mpq.kernels.attention import attend_plainly
from mpq.kernels.gpu.triton.attend_kernel import attend_kernel
from mpq.rounding.codes import COPY_DTYPES

SPLITS = 32  # programs that share a key head's blocks, at most


@dataclass(frozen=True)
class Stored:
    """Compile-time constants of a cache format; a value is (code - offset) * scale + minimum, or a float."""

    bits: int
    offset: int
    group: int
    minimum: bool
    floats: bool
    size: int  # bytes of a block
    width: int
    padded: int


def stored_of(name: str, width: int) -> Stored | None:
    """The kernel's constants of a format; None for formats other than floats and integers of 2, 4 and 8 bits."""
    format = parse_cache_format(name)
    if isinstance(format, TokenBlocks) or not blocks.supports(format, width):
        return None
    integer = format.grid.family == "int" and 8 % format.grid.bits == 0 and format.scale == "fp16"
    if not integer and not format.is_float_copy:
        return None
    group = format.group_size if format.granularity == "group" else blocks.padded(width)
    return Stored(
        format.grid.bits, format.grid.offset, group, bool(format.minimum), format.is_float_copy,
        blocks.block_bytes(format, width), width, blocks.padded(width),
    )  # fmt: skip


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], key_format: str,
    value_format: str, query_format: str, scale: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """torch.ops.mpq.attend, one launch for each slab; formats without a kernel use the reference."""
    width, each = query.shape[2], len(keys) // len(lengths)
    stored = [stored_of(name, width) for name in (key_format, value_format)]
    if None in stored or not all(slab.is_contiguous() for slab in (*keys, *values)):
        return attend_plainly(
            query, keys, values, lengths, key_format, value_format, query_format, scale, window, sinks
        )
    q = (reference.quantize_activation(query, query_format) if query_format else query).float().contiguous()
    outputs = []
    for index, length in enumerate(lengths):
        own = slice(index * each, (index + 1) * each)
        first, parts, start = max(0, length - window) if window else 0, [], 0
        for pair in zip(keys[own], values[own], strict=True):
            end = start + blocks.TOKENS * pair[0].shape[1]
            if max(first, start) < min(length, end):
                seen = (max(first, start) - start, min(length, end) - start)
                parts.append(_launch(q[index], *pair, *seen, stored, (key_format, value_format), scale))
            start = end
        outputs.append(_merged(parts, query.shape[1], width, sinks))
    return torch.stack(outputs).to(query.dtype)


def _launch(
    q: Tensor, keys: Tensor, values: Tensor, first: int, last: int, stored: Sequence[Stored | None],
    names: Sequence[str], scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Largest score, sum and mixed values of each share: (key heads, shares, group[, width])."""
    heads, group = len(keys), len(q) // len(keys)
    count = -(-last // 64) - first // 64
    each = -(-count // SPLITS)
    shares, rows = -(-count // each), max(16, triton.next_power_of_2(group))
    columns = max(16, triton.next_power_of_2(q.shape[1]))
    largest, total = (q.new_empty((heads, shares, rows)) for _ in range(2))
    mixed = q.new_empty((heads, shares, rows, columns))
    tables = [slab.view(COPY_DTYPES.get(name, torch.float16)) for slab, name in zip((keys, values), names, strict=True)]
    attend_kernel[(heads, shares)](
        q, keys, tables[0], values, tables[1], largest, total, mixed, first, last, each, keys.shape[1], group, scale,
        KEYS=stored[0], VALUES=stored[1], ROWS=rows, WIDTH=columns,
    )  # fmt: skip
    return largest[:, :, :group], total[:, :, :group], mixed[:, :, :group, : q.shape[1]]


def _merged(parts: Sequence[tuple[Tensor, ...]], heads: int, width: int, sinks: Tensor | None) -> Tensor:
    """The softmax over all shares: (heads, width)."""
    largest, total, mixed = (torch.cat(same, 1) for same in zip(*parts, strict=True))
    top = largest.amax(1, keepdim=True)
    sunk = None if sinks is None else sinks.float().reshape(len(largest), 1, -1)
    if sunk is not None:
        top = torch.maximum(top, sunk)
    weight = (largest - top).exp()
    below = (weight * total).sum(1) + (0 if sunk is None else (sunk - top).exp()[:, 0])
    return ((weight.unsqueeze(-1) * mixed).sum(1) / below.unsqueeze(-1)).reshape(heads, width)
