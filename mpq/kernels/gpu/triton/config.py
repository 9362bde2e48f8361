"""Block sizes of a product: from the device's table, else from a conservative rule."""

from dataclasses import dataclass

from mpq.kernels.gpu.triton.spec import Spec


@dataclass(frozen=True)
class Config:
    """Output channels, tokens and columns of a program's step; programs that share a block; warps; pipeline stages.

    With `programs`, that many persistent programs share all steps evenly (see `stream`), and `split` is not used.

    backend "cuda" or "hopper" is a CUDA C++ kernel (`mpq.kernels.gpu.cuda`), used where it applies and has been
    verified (`mpq.kernels.gpu.cuda.verification`); of these settings it reads `split` alone.
    """

    block_n: int = 64
    block_m: int = 16
    block_k: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 4
    programs: int = 0
    backend: str = "triton"


def step_cols(spec: Spec) -> int:
    """Columns of a step that lie in one group, so that group scales reach the accumulators; 64 where none do."""
    if spec.group == 0:
        return 128 if spec.bits <= 4 else 64
    return next((cols for cols in (128, 64, 32) if spec.group % cols == 0), 64)


def default_config(spec: Spec, tokens: int, rows: int, cols: int, processors: int) -> Config:
    """Conservative block sizes, not tuned.

    Few tokens: enough programs to fill the device twice, with blocks split where there are too few. Above 32 tokens the
    partial sums of split blocks would move more bytes than the weights: persistent programs are used instead, which
    have at most two partial sums each.
    """
    block_m = next((size for size in (16, 32, 64) if tokens <= size), 128)
    block_n = 64 if block_m <= 64 else 128
    block_k = step_cols(spec)
    warps, stages = (4, 4) if block_n == 64 else (8, 3)
    if block_m >= 64:
        resident = processors * (2 if block_n == 64 else 1)
        return Config(block_n, block_m, min(block_k, 64), warps=warps, stages=stages, programs=resident)
    programs = -(-rows // block_n) * -(-tokens // block_m)
    steps = -(-cols // block_k)
    split = 1
    while programs * split < 2 * processors and steps >= 8 * split and split < 16:
        split *= 2
    return Config(block_n, block_m, block_k, split, warps, stages)
