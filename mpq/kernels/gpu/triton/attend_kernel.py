"""Attention of one key head's query heads to a share of a slab's blocks, as device code.

The query heads are padded to 16 rows of a matrix product. The caller merges the softmaxes of all shares, in order.
"""

import triton
import triton.language as tl


@triton.jit
def load_block(codes, tables, block, token, col, FORMAT: tl.constexpr, VALUES: tl.constexpr):
    """Numbers of the block at byte `block`, float32 (64, columns); `tables` is the same memory as floats."""
    real = (col < FORMAT.width)[None, :] & (token >= 0)[:, None]
    if FORMAT.floats:
        at = block // (FORMAT.bits // 8) + token[:, None] * FORMAT.width + col[None, :]
        value = tl.load(tables + at, mask=real, other=0.0).to(tl.float32)
    else:
        PER: tl.constexpr = 8 // FORMAT.bits
        if VALUES:
            step = (col // 16)[None, :] * 16 + (token // 4)[:, None]
            index = (col % 16)[None, :] * 4 + (token % 4)[:, None]
        else:
            step = (token // 16)[:, None] * (FORMAT.padded // 4) + (col // 4)[None, :]
            index = (token % 16)[:, None] * 4 + (col % 4)[None, :]
        byte = tl.load(codes + block + (step // PER) * 64 + index, mask=real, other=0).to(tl.int32)
        level = (byte >> ((step % PER) * FORMAT.bits)) & ((1 << FORMAT.bits) - 1)
        at = (block + 8 * FORMAT.bits * FORMAT.padded) // 2 + (col // FORMAT.group)[None, :] * 64 + token[:, None]
        value = (level - FORMAT.offset).to(tl.float32) * tl.load(tables + at, mask=real, other=0.0).to(tl.float32)
        if FORMAT.minimum:
            groups = (FORMAT.width + FORMAT.group - 1) // FORMAT.group
            value += tl.load(tables + at + groups * 64, mask=real, other=0.0).to(tl.float32)
    return value


@triton.jit
def attend_kernel(
    q, key_codes, key_tables, value_codes, value_tables, largest, total, mixed,
    first, last, each, block_count, group, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One share of a key head: tokens `first` to `last` of a slab, `each` blocks; q (key heads, group, width)."""
    head, part = tl.program_id(0), tl.program_id(1)
    row, col, token = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, 64)
    at = (head * group + row)[:, None] * KEYS.width + col[None, :]
    query = tl.load(q + at, mask=(row < group)[:, None] & (col < KEYS.width)[None, :], other=0.0) * scale
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = first // 64 + part * each
    for index in range(begin, tl.minimum(begin + each, (last + 63) // 64)):
        place = head.to(tl.int64) * block_count + index
        seen = (index * 64 + token >= first) & (index * 64 + token < last)
        keys = load_block(key_codes, key_tables, place * KEYS.size, token, col, KEYS, False)
        scores = tl.dot(query, tl.trans(tl.where(seen[:, None], keys, 0.0)), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp(most - top)
        weights = tl.exp(scores - top[:, None])
        values = load_block(value_codes, value_tables, place * VALUES.size, token, col, VALUES, True)
        sums = sums * decay + tl.sum(weights, 1)
        values = tl.where(seen[:, None], values, 0.0)
        acc = acc * decay[:, None] + tl.dot(weights, values, input_precision="ieee")
        most = top
    share = (head * tl.num_programs(1) + part) * ROWS + row
    tl.store(largest + share, most)
    tl.store(total + share, sums)
    tl.store(mixed + share[:, None] * WIDTH + col[None, :], acc)
