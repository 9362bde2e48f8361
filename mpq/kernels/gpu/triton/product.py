"""The matrix product over packed weights: one kernel for every format, batch size and mode.

The weights are the left operand, so that small batches fill the short side of the matrix instructions: a program
computes out.T for BLOCK_N output channels and BLOCK_M tokens, walking the columns in steps of BLOCK_K. Group scales are
applied to the accumulators once per group where BLOCK_K divides the group, which keeps the weights exact; where a step
spans several groups, to the weights. With SPLIT > 1 every program sums its share of the columns into a buffer of its
own, and `reduce_kernel` adds the shares in a fixed order: no atomics, the same bits each time. `stream.py` distributes
the same blocks over persistent programs.
"""

import triton
import triton.language as tl

from mpq.kernels.gpu.triton.decode import load_codes, load_scales, to_numbers


@triton.jit
def _dot(weights, inputs, MODE: tl.constexpr, EMULATE: tl.constexpr):
    if MODE == "int8":
        product = tl.dot(weights, inputs, out_dtype=tl.int32)
    elif EMULATE:
        product = tl.dot(weights.to(tl.float32), inputs.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(weights, inputs)
    return product


@triton.jit
def _zeros(zeros, at, mask, SPEC: tl.constexpr):
    """The code of zero: int16 of the shape of `at`, or of one element."""
    if SPEC.zero_point:
        values = tl.load(zeros + at, mask=mask, other=0).to(tl.int16)
    else:
        values = tl.full(at.shape, SPEC.offset, tl.int16)
    return values


@triton.jit
def block_sums(
    inputs, input_scale, first, second, third, scale, zeros, tensor_scale, table,
    block, first_step, last_step, M, K, padded_n, col_blocks, input_row, input_col,
    SPEC: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, MAGIC: tl.constexpr,
    INPUT_SCALE: tl.constexpr, EVEN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The contribution of steps `first_step` to `last_step` - 1 to a block: scaled float32 (BLOCK_N, BLOCK_M).

    Blocks are counted along the tokens first. MODE "float": 16-bit inputs and weights; "int8": int8 inputs with each
    tile's 16 columns in a lane's order, and float32 `input_scale` (M,); "fp8" likewise. EVEN: no mask is needed along
    weights and columns.
    """
    COL_TILES: tl.constexpr = BLOCK_K // 16
    WHOLE_ROWS: tl.constexpr = SPEC.group == 0
    PER_STEP: tl.constexpr = SPEC.group == 0 or SPEC.group % BLOCK_K == 0
    pids_m = tl.cdiv(M, BLOCK_M)
    row_n = (block // pids_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = (block % pids_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_n = row_n < padded_n
    real_m = row_m < M
    row_tile = (block // pids_m) * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    lane = tl.arange(0, 32)
    col_tile = tl.arange(0, COL_TILES)
    col = tl.arange(0, BLOCK_K)
    lane_place = row_tile.to(tl.int64)[:, None, None] * (col_blocks * 128) + lane[None, :, None] * 4
    input_at = inputs + row_m.to(tl.int64)[:, None] * input_row + col[None, :] * input_col
    if WHOLE_ROWS and MODE == "int8":
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first_step, last_step):
        start = step * BLOCK_K
        if COL_TILES >= 4:
            col_block = step * (COL_TILES // 4) + col_tile // 4
            place = lane_place + (col_block * 128 + col_tile % 4)[None, None, :]
        else:
            col_block = step // (4 // COL_TILES) + col_tile * 0
            place = lane_place + (col_block * 128 + (step % (4 // COL_TILES)) * COL_TILES + col_tile)[None, None, :]
        stored = (row_tile < padded_n // 16)[:, None, None] & (col_block < col_blocks)[None, None, :]
        stored = stored & (lane >= 0)[None, :, None]
        codes = load_codes(first, second, third, place, stored, SPEC.bits, MAGIC, not EVEN, MODE != "float")
        if EVEN:
            tokens = tl.load(input_at + start * input_col, mask=real_m[:, None], other=0.0)
        else:
            tokens = tl.load(input_at + start * input_col, mask=real_m[:, None] & (start + col < K)[None, :], other=0.0)
        if PER_STEP:
            group_at = row_n if WHOLE_ROWS else (start // SPEC.group) * padded_n + row_n
            weights = to_numbers(codes, _zeros(zeros, group_at, real_n, SPEC)[:, None], table, SPEC, DTYPE, EMULATE)
            part = _dot(weights, tl.trans(tokens), MODE, EMULATE)
            if WHOLE_ROWS:
                acc += part
            else:
                acc += part.to(tl.float32) * load_scales(scale, group_at, real_n, SPEC)[:, None]
        else:
            group = tl.minimum((start + col_tile * 16) // SPEC.group, (K - 1) // SPEC.group)
            group_at = group[None, :] * padded_n + row_n[:, None]
            mask = real_n[:, None] & (col_tile >= 0)[None, :]
            spread_zeros = _by_column(_zeros(zeros, group_at, mask, SPEC), BLOCK_N, BLOCK_K)
            numbers = to_numbers(codes, spread_zeros, table, SPEC, DTYPE, EMULATE).to(tl.float32)
            scaled = numbers * _by_column(load_scales(scale, group_at, mask, SPEC), BLOCK_N, BLOCK_K)
            acc += _dot(scaled.to(DTYPE), tl.trans(tokens), MODE, EMULATE)
    total = acc.to(tl.float32)
    if WHOLE_ROWS:
        total *= load_scales(scale, row_n, real_n, SPEC)[:, None]
    if SPEC.tensor_scale:
        total *= tl.load(tensor_scale)
    if INPUT_SCALE:
        total *= tl.load(input_scale + row_m, mask=real_m, other=0.0)[None, :]
    return total


@triton.jit
def put_block(
    total, bias, out, block, M, N, out_row,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a block's sums to out (M, N), with the bias (N,)."""
    pids_m = tl.cdiv(M, BLOCK_M)
    row_n = (block // pids_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = (block % pids_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row_n < N)[:, None] & (row_m < M)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row_n, mask=row_n < N, other=0.0).to(tl.float32)[:, None]
    out_at = row_m.to(tl.int64)[None, :] * out_row + row_n[:, None]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    inputs, input_scale, first, second, third, scale, zeros, tensor_scale, table, bias, out,
    M, N, K, padded_n, col_blocks, input_row, input_col, out_row, steps, steps_per_split,
    SPEC: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, INPUT_SCALE: tl.constexpr, EVEN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out (M, N) = inputs (M, K) @ weights.T + bias; with SPLIT > 1, float32 (SPLIT, M, N) shares without the bias."""
    block = tl.program_id(0)
    first_step = tl.program_id(1) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)
    total = block_sums(
        inputs, input_scale, first, second, third, scale, zeros, tensor_scale, table,
        block, first_step, last_step, M, K, padded_n, col_blocks, input_row, input_col,
        SPEC, MODE, DTYPE, MAGIC, INPUT_SCALE, EVEN, EMULATE, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if SPLIT > 1:
        out += tl.program_id(1).to(tl.int64) * M * out_row
    put_block(total, bias, out, block, M, N, out_row, HAS_BIAS and SPLIT == 1, BLOCK_N, BLOCK_M)


@triton.jit
def _by_column(values, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(rows, column tiles) as (rows, columns): each value for its tile's 16 columns."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (ROWS, COLS // 16, 16)), (ROWS, COLS))


@triton.jit
def reduce_kernel(
    shares, bias, out, size, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (M, N) = shares (SPLIT, M, N) summed in order + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(shares + at, mask=inside, other=0.0)
    for share in tl.static_range(1, SPLIT):
        total += tl.load(shares + share * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
