"""Cached vectors in blocks of 64 tokens, as the kernels of attention read them.

cpu/src/abi.h specifies the bytes. Floats of 8, 16 and 32 bits are stored token by token. Other codes are stored in
steps of 64: 4 columns of 16 tokens for keys, 4 tokens of 16 columns for values, so that a kernel's 16 lanes are tokens
of keys and columns of values. A block's scales and zeros, 64 for each group of columns, follow its codes; `TokenBlocks`
have one for each column. Their newest tokens, which do not fill a block, are floats in a separate first slab.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpq.core.cache import TokenBlocks
from mpq.core.formats import Format
from mpq.kernels.kv_cache import Heads, dequantize_heads, quantize_heads
from mpq.kernels.layout import pack_bits, unpack_bits
from mpq.kernels.token_blocks import columns, vectors_of
from mpq.rounding.codes import COPY_DTYPES, SCALE_DTYPES

TOKENS = 64  # tokens per block
LANES = 16


def supports(format: Format, width: int) -> bool:
    """Whether vectors of a format can be stored in blocks: one scale per vector or per multiple of 16 columns, or
    `TokenBlocks` of 64 tokens.
    """
    if isinstance(format, TokenBlocks):
        return format.tokens == TOKENS
    return format.groups(width) < 2 or format.group_size % LANES == 0


def in_rows(format: Format) -> bool:
    """Whether elements are stored token by token."""
    return format.is_float_copy or (format.grid.family == "float" and format.grid.bits == 8)


def padded(width: int) -> int:
    """Columns of a vector, padded to whole lanes."""
    return -(-width // LANES) * LANES


def scale_groups(format: Format, width: int) -> int:
    """Stored scales of a vector."""
    return 0 if format.granularity in ("tensor", "none") else format.groups(width)


@lru_cache(maxsize=256)
def block_bytes(format: Format, width: int) -> int:
    """Bytes of 64 tokens of a head."""
    scale, zero = SCALE_DTYPES[format.scale or "fp32"].itemsize, SCALE_DTYPES[format.minimum or "fp32"].itemsize
    entries = padded(width) if isinstance(format, TokenBlocks) else scale_groups(format, width) * TOKENS
    table = entries * (scale + zero * bool(format.minimum))
    return table + TOKENS * (width if in_rows(format) else padded(width)) * format.grid.bits // 8


def parted(slabs: Sequence[Tensor], format: Format) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The newest tokens' floats (key heads, 64, width) if these are `TokenBlocks`, and the slabs of blocks."""
    return (slabs[0], slabs[1:]) if isinstance(format, TokenBlocks) else (None, slabs)


def packed_blocks(vectors: Tensor, format: Format, values: bool) -> Tensor:  # float (heads, tokens, width)
    """Vectors of whole blocks, rounded: uint8 (heads, blocks, bytes)."""
    if not isinstance(format, TokenBlocks):
        return arrange(quantize_heads(vectors.unsqueeze(0), format), values)
    heads, tokens, width = vectors.shape
    rounded = quantize_heads(columns(vectors.unsqueeze(0), format), format.within)
    codes = unpack_bits(rounded.codes.flatten(0, 2), format.grid.bits, TOKENS).reshape(1, -1, width, TOKENS)
    flat = pad(vectors_of(codes, heads)[0], (0, -width % LANES))
    tables = [
        pad(part.reshape(heads, tokens // TOKENS, width), (0, -width % LANES)).contiguous().view(torch.uint8)
        for part in rounded.tensors[1:]
    ]
    return torch.cat([_bytes_of(_steps(flat, values), format.grid.bits).reshape(*tables[0].shape[:2], -1), *tables], 2)


def numbers_of(blocks: Tensor, format: Format, width: int, values: bool) -> Tensor:  # uint8 (heads, blocks, bytes)
    """The inverse, float32 (heads, tokens, width)."""
    if not isinstance(format, TokenBlocks):
        return dequantize_heads(restore(blocks, format, width, values))[0]
    heads, count, bits = len(blocks), blocks.shape[1], format.grid.bits
    kinds = [SCALE_DTYPES[kind] for kind in (format.scale, format.minimum) if kind]
    sizes = [padded(width) * kind.itemsize for kind in kinds]
    codes, *parts = torch.split(blocks, [blocks.shape[2] - sum(sizes), *sizes], 2)
    tables = [
        part.contiguous().view(kind)[..., :width].reshape(1, heads * count, width, 1)
        for part, kind in zip(parts, kinds, strict=True)
    ]
    flat = _flat(_steps_of(codes.reshape(heads, count, -1), bits), width, values).reshape(1, heads, -1, width)
    stream = pack_bits(columns(flat, format).reshape(-1, TOKENS), bits).reshape(1, heads * count, width, -1)
    return vectors_of(dequantize_heads(Heads(format.within, TOKENS, stream, *tables)), heads)[0]


def arrange(heads: Heads, values: bool) -> Tensor:
    """Vectors of one sequence as blocks, uint8 (heads, blocks, bytes); zeros fill the last block."""
    format, (batch, count, tokens) = heads.format, heads.codes.shape[:3]
    assert batch == 1
    blocks, missing = -(-tokens // TOKENS), -tokens % TOKENS
    tables = [
        pad(part[0], (0, 0, 0, missing)).reshape(count, blocks, TOKENS, -1).transpose(2, 3).contiguous()
        for part in heads.tensors[1:]
    ]
    parts = [table.view(torch.uint8).reshape(count, blocks, -1) for table in tables]
    if in_rows(format):
        codes = pad(heads.codes[0], (0, 0, 0, missing)).contiguous().view(torch.uint8)
        return torch.cat([codes.reshape(count, blocks, -1), *parts], 2)
    flat = unpack_bits(heads.codes.flatten(0, 2), format.grid.bits, heads.width).reshape(count, tokens, -1)
    filled = pad(flat, (0, -heads.width % LANES, 0, missing))
    return torch.cat([_bytes_of(_steps(filled, values), format.grid.bits).reshape(count, blocks, -1), *parts], 2)


def restore(blocks: Tensor, format: Format, width: int, values: bool) -> Heads:
    """The inverse of `arrange`, with all tokens of the blocks: from uint8 (heads, blocks, bytes)."""
    count, tokens, bits = len(blocks), blocks.shape[1] * TOKENS, format.grid.bits
    kinds = [SCALE_DTYPES[kind] for kind in (format.scale, format.minimum) if kind and scale_groups(format, width)]
    sizes = [scale_groups(format, width) * TOKENS * kind.itemsize for kind in kinds]
    codes, *parts = torch.split(blocks, [blocks.shape[2] - sum(sizes), *sizes], 2)
    tables = [
        part.contiguous().view(kind).reshape(count, -1, scale_groups(format, width), TOKENS).transpose(2, 3)
        .reshape(1, count, tokens, -1)
        for part, kind in zip(parts, kinds, strict=True)
    ]  # fmt: skip
    if in_rows(format):
        kind = COPY_DTYPES[format.grid.name] if format.is_float_copy else torch.uint8
        return Heads(format, width, codes.contiguous().view(kind).reshape(1, count, tokens, width), *tables)
    flat = _flat(_steps_of(codes.reshape(count, blocks.shape[1], -1), bits), width, values)
    return Heads(format, width, pack_bits(flat, bits).reshape(1, count, tokens, -1), *tables)


def _steps(codes: Tensor, values: bool) -> Tensor:  # uint8 (heads, tokens, columns)
    """(heads, blocks, steps, 64)."""
    heads, tokens, columns = codes.shape
    blocks = codes.reshape(heads, tokens // TOKENS, TOKENS, columns)
    if values:
        parted = blocks.reshape(*blocks.shape[:2], TOKENS // 4, 4, columns // LANES, LANES).permute(0, 1, 4, 2, 5, 3)
    else:
        parted = blocks.reshape(*blocks.shape[:2], TOKENS // LANES, LANES, columns // 4, 4).permute(0, 1, 2, 4, 3, 5)
    return parted.reshape(heads, tokens // TOKENS, -1, 64)


def _flat(steps: Tensor, width: int, values: bool) -> Tensor:  # uint8 (heads, blocks, steps, 64)
    """The inverse, (heads * tokens, width)."""
    count = len(steps)
    if values:  # (heads, blocks, strips, 4 tokens, 16 columns, 4)
        parted = steps.reshape(count, -1, padded(width) // LANES, TOKENS // 4, LANES, 4).permute(0, 1, 3, 5, 2, 4)
    else:  # (heads, blocks, strips, 4 columns, 16 tokens, 4)
        parted = steps.reshape(count, -1, TOKENS // LANES, padded(width) // 4, LANES, 4).permute(0, 1, 2, 4, 3, 5)
    return parted.reshape(-1, padded(width))[:, :width]


def _bytes_of(steps: Tensor, bits: int) -> Tensor:  # uint8 (heads, blocks, steps, 64)
    """Packed like a weight's steps: 8 / bits steps share 64 bytes, or each step is a bit stream."""
    if 8 % bits:
        return pack_bits(steps.reshape(-1, 64), bits).reshape(*steps.shape[:2], -1)
    together = 8 // bits
    parts = [steps[:, :, place::together] << bits * place for place in range(together)]
    return torch.stack(parts).sum(0, dtype=torch.uint8)


def _steps_of(stream: Tensor, bits: int) -> Tensor:  # uint8 (heads, blocks, bytes)
    """The inverse of `_bytes_of`: (heads, blocks, steps, 64)."""
    if 8 % bits:
        return unpack_bits(stream.reshape(-1, 8 * bits), bits, 64).reshape(*stream.shape[:2], -1, 64)
    shared = stream.reshape(*stream.shape[:2], -1, 1, 64)
    parts = [shared >> bits * place & 2**bits - 1 for place in range(8 // bits)]
    return torch.cat(parts, 3).reshape(*stream.shape[:2], -1, 64)
