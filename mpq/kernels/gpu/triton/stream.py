"""The same product by persistent programs: stream-K (Osama et al., arXiv 2301.03598), without atomics.

As many programs are launched as run at once. Each first computes whole blocks, a wave at a time; the blocks of the last
full wave and of the unfilled one behind it are cut by steps instead, an equal run for every program (the paper's
"two-tile" hybrid). Sums of a part of a block go to the program's own two places, and a second launch adds the parts of
each block in the programs' order: the same bits each time.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from mpq.kernels.gpu.triton.product import block_sums, put_block


@dataclass(frozen=True)
class Stream:
    """Distribution of blocks of `steps` steps: `waves` whole blocks a program, then `quota` steps of the rest."""

    programs: int
    blocks: int
    steps: int

    @property
    def waves(self) -> int:
        """Whole blocks of each program."""
        full, unfilled = divmod(self.blocks, self.programs)
        return full - 1 if unfilled and full else full

    @property
    def shared(self) -> int:
        """Blocks that are cut by steps."""
        return self.blocks - self.waves * self.programs

    @property
    def quota(self) -> int:
        """Steps of a program in the shared blocks; the last programs may have fewer, or none."""
        return -(-self.shared * self.steps // self.programs)


@triton.jit
def stream_kernel(
    inputs, input_scale, first, second, third, scale, zeros, tensor_scale, table, bias, out, parts,
    M, N, K, padded_n, col_blocks, input_row, input_col, out_row, steps, waves, quota, shared,
    SPEC: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, INPUT_SCALE: tl.constexpr, EVEN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whole blocks into out (M, N); parts of blocks into float32 (programs, 2, BLOCK_N, BLOCK_M).

    A program's first place is for the block in which its run of shared steps begins, the second for where it ends.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = program * quota
    end = tl.minimum(start + quota, shared * steps)
    wave = 0
    at = start
    while (wave < waves) | (at < end):
        whole = wave < waves
        block = tl.where(whole, wave * programs + program, waves * programs + at // steps)
        first_step = tl.where(whole, 0, at % steps)
        last_step = tl.where(whole, steps, tl.minimum(steps, first_step + end - at))
        total = block_sums(
            inputs, input_scale, first, second, third, scale, zeros, tensor_scale, table,
            block, first_step, last_step, M, K, padded_n, col_blocks, input_row, input_col,
            SPEC, MODE, DTYPE, MAGIC, INPUT_SCALE, EVEN, EMULATE, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if last_step - first_step == steps:
            put_block(total, bias, out, block, M, N, out_row, HAS_BIAS, BLOCK_N, BLOCK_M)
        else:
            place = 2 * program + tl.where(at == start, 0, 1)
            spot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            tl.store(parts + place.to(tl.int64) * (BLOCK_N * BLOCK_M) + spot, total)
        at += tl.where(whole, 0, last_step - first_step)
        wave += 1


@triton.jit
def join_kernel(
    parts, bias, out, M, N, out_row, steps, quota, before,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the sums of shared blocks, ROWS channels for each program; the first `before` blocks are complete."""
    begin = tl.program_id(0) * steps
    first_program = begin // quota
    last_program = (begin + steps - 1) // quota
    if first_program < last_program:  # a single part was written to the block directly
        strip = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        token = tl.arange(0, BLOCK_M)
        spot = strip[:, None] * BLOCK_M + token[None, :]
        total = tl.zeros((ROWS, BLOCK_M), tl.float32)
        for program in range(first_program, last_program + 1):
            place = 2 * program + tl.where(program * quota >= begin, 0, 1)
            total += tl.load(parts + place.to(tl.int64) * (BLOCK_N * BLOCK_M) + spot)
        block = before + tl.program_id(0)
        pids_m = tl.cdiv(M, BLOCK_M)
        row_n = (block // pids_m) * BLOCK_N + strip
        row_m = (block % pids_m) * BLOCK_M + token
        if HAS_BIAS:
            total += tl.load(bias + row_n, mask=row_n < N, other=0.0).to(tl.float32)[:, None]
        inside = (row_n < N)[:, None] & (row_m < M)[None, :]
        out_at = row_m.to(tl.int64)[None, :] * out_row + row_n[:, None]
        tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)
