"""Products by weights with formats by row, against one format of the same bytes.

    python -m experiments.benchmarks.bench_mixes [--quick]

A random half of the rows is in int2-g64, the other half in int4-g64: the bytes of int3-g64. Contestants alternate,
copies of the weights exceed the cache, figures are ratios of medians.
"""

import argparse
import statistics
from functools import partial

import torch

from experiments.result import result
from mpq.core.assignment import random_assignment
from mpq.core.formats import parse_format
from mpq.core.mix import mix_of
from mpq.kernels.bench import BEYOND, CPU, placed
from mpq.kernels.clock import Contestant, interleaved
from mpq.kernels.cpu import native as cpu
from mpq.kernels.layout import pack
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import seeded
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import quantize

PARTS, WHOLE = ("int2-g64", "int4-g64"), "int3-g64"
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096))
GOALS = {1: 1.03, 4: 1.03, 16: 1.0, 64: 1.0}  # by tokens


def weights(rows: int, cols: int, beyond: int) -> tuple[list[PackedWeight], list[PackedWeight]]:
    """Copies of a mix and of one format that fill `beyond` bytes each."""
    matrix = torch.randn(rows, cols, generator=seeded(0, rows, cols))
    formats = [parse_format(name) for name in PARTS]
    mix = mix_of(formats, parse_format(WHOLE).effective_bits())
    mix = random_assignment(mix, rows, cols)
    packed = [pack(mixed(mix, [quantize(matrix, format) for format in formats]))]
    packed.append(pack(quantize(matrix, parse_format(WHOLE))))

    count = max(2, beyond // packed[0].nbytes)
    mixes, wholes = ([placed(one) for _ in range(count)] for one in packed)
    return mixes, wholes


def main() -> None:
    """Time the shapes and compare the ratios with the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, one and 16 tokens")
    options = parser.parse_args()
    print(f"instructions {cpu.level_name()}, {torch.get_num_threads()} threads")
    for rows, cols in SHAPES[:1] if options.quick else SHAPES:
        mixes, wholes = weights(rows, cols, 2**25 if options.quick else BEYOND // 2)
        for tokens in (1, 16) if options.quick else GOALS:
            x = torch.randn(tokens, cols, generator=seeded(1, cols))
            contestants = [Contestant([partial(one.linear, x, None) for one in group]) for group in (mixes, wholes)]
            times = interleaved(contestants, 30 if options.quick or tokens > 4 else 100, CPU)
            ours, single = (statistics.median(each) for each in times)
            ratio, goal = ours / single, GOALS[tokens]
            print(f"{rows}x{cols}, {tokens} tokens: mix {1e6 * ours:.0f} us, {WHOLE} {1e6 * single:.0f} us")
            print(result(f"mix_over_one/{rows}x{cols}/batch{tokens}", ratio, f"<={goal}", ratio <= goal), flush=True)


if __name__ == "__main__":
    main()
