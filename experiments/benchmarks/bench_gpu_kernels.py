"""The GPU kernels against the device's copy bandwidth, cuBLAS in bfloat16 and others' int4 kernels.

    python -m experiments.benchmarks.bench_gpu_kernels [--quick] [--tune] [--table latency.json]

Contestants alternate within one run by graph replay, copies of the weights exceed the L2 cache, figures are medians.
Peers are those that can be imported (gpu_peers.py). The last part times ten random mixed allocations of a
LLaMA-7B-shaped stack against the sum of the latency table. Without a CUDA device it says so and stops.
"""

import argparse
import logging
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import cycle

import numpy as np
import torch

from experiments.peers.gpu_peers import peers_of
from experiments.result import result
from mpq.core.formats import parse_format
from mpq.core.latency import LatencyTable
from mpq.kernels.bench import BEYOND, Timing, latency_table, measure
from mpq.kernels.clock import Contestant, copies, interleaved
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import quantize

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
PARTS = ["table", "peers", "mixed"]
BATCHES = [1, 4, 16, 32, 64, 128, 256]
INT4 = "int4-g128"
FORMATS = [
    INT4, "int4-g128-asym", "int4-g32", "int4-channel", "int2-g128", "int3-g128", "int5-g128", "int6-g128", "int7-g128",
    "int8-channel", "fp8-e4m3-channel", "fp6-e2m3-channel", "fp6-e3m2-channel", "fp4-e2m1-g32", "mxfp4", "mxfp6-e2m3",
    "mxfp8-e4m3", "nvfp4", "nf4-g64",
]  # fmt: skip
ROUNDED = ["int4-g128+a:int8-token", "int8-channel+a:int8-token", "fp8-e4m3-channel+a:fp8-e4m3-token"]
# rows x columns of a LLaMA-7B block, and how many of each: q, k, v, o; gate, up; down
BLOCK = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
BLOCKS, MIXED_BATCHES, ALLOCATIONS = 32, [1, 16], 10
MIXED = ["int2-g128", "int3-g128", INT4, "int6-g128", "int8-channel", "mxfp4", "nvfp4", "nf4-g64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, two formats, no peers, one allocation")
    parser.add_argument("--tune", action="store_true", help="choose blocks by timing first, into the user's cache")
    parser.add_argument("--table", help="where to write the latency table")
    parser.add_argument("--formats", help="of the first part, separated by commas (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: all)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not torch.cuda.is_available():
        print("no CUDA device here: the GPU kernels' speeds stay unmeasured (their results are tested without one)")
        return
    try:
        from mpq.kernels.gpu.triton.tune import tune
    except ImportError:
        print("Triton is not installed, which the GPU kernels need: pip install triton")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    shapes = [(512, 512)] if options.quick else SHAPES
    batches = [1, 16] if options.quick else BATCHES
    schemes = options.formats.split(",") if options.formats else [*FORMATS, *ROUNDED]
    schemes = [INT4, "mxfp4"] if options.quick else schemes
    if options.tune:
        for scheme in schemes:
            for rows, cols in dict.fromkeys([*shapes, *([] if options.quick else BLOCK)]):
                for batch in batches:
                    tune(scheme, rows, cols, batch, device)
    timed = schemes if "table" in options.parts else []
    timings = table_of(timed, shapes, batches, device, quick=options.quick) if timed else []
    results_of_table(timings)
    if "peers" in options.parts and not options.quick:
        against_peers(shapes, batches, device)
    if "mixed" in options.parts:
        mixed(device, quick=options.quick)
    if options.table:
        latency_table(timings, device).save(options.table)


def table_of(
    schemes: Sequence[str], shapes: Sequence[tuple[int, int]], batches: Sequence[int], device: torch.device, quick: bool
) -> list[Timing]:
    print(f"{'scheme':32} {'rows x cols':>13} batch {'us':>9} {'GB/s':>7} {'of copy':>7} {'x bf16':>7}")
    found = []
    for timing in measure(schemes, shapes, batches, repeats=5 if quick else 30, device=device):
        found.append(timing)
        print(
            f"{timing.scheme:32} {f'{timing.rows} x {timing.cols}':>13} {timing.batch:5} {1e6 * timing.seconds:9.1f} "
            f"{timing.nbytes / timing.seconds / 1e9:7.0f} {timing.roof:7.1%} {timing.bfloat16 / timing.seconds:7.2f}",
            flush=True,
        )
    return found


def results_of_table(timings: Sequence[Timing]) -> None:
    """RESULT lines of bandwidth, speed-up over bf16, and every format's time against int4's scaled by bytes."""
    int4 = {(timing.rows, timing.cols): timing for timing in timings if timing.scheme == INT4 and timing.batch == 1}
    for timing in timings:
        name = f"{timing.scheme}/{timing.rows}x{timing.cols}/batch{timing.batch}"
        speedup = timing.bfloat16 / timing.seconds
        if timing.scheme == INT4 and timing.batch <= 16 and timing.rows * timing.cols > 4096 * 4096:
            print_result(f"share_of_copy/{name}", timing.roof, 0.85)
        if timing.scheme == INT4 and timing.batch in (64, 128, 256):
            print_result(f"speedup_over_bf16/{name}", speedup, {64: 2.5, 128: 1.5, 256: 1.0}[timing.batch])
        if timing.scheme != INT4 and timing.batch == 1 and "+a:" not in timing.scheme:
            print_result(f"share_of_copy/{name}", timing.roof, 0.80)
            base = int4.get((timing.rows, timing.cols))
            if base is None:
                continue
            promised = base.seconds * timing.nbytes / base.nbytes
            print_result(f"time_over_promised/{name}", timing.seconds / promised, 1.15, most=True)


def against_peers(shapes: Sequence[tuple[int, int]], batches: Sequence[int], device: torch.device) -> None:
    """RESULT lines of int4 in groups of 128 in other kernels: their time as a multiple of ours."""
    for rows, cols in shapes:
        quantized = quantize(torch.randn(rows, cols, device=device), parse_format(INT4))
        peers = peers_of(quantized, BEYOND)
        for batch in batches:
            x = torch.randn(batch, cols, device=device).bfloat16()
            ours = Stock(device).contestant(INT4, rows, cols, x)
            times = interleaved([ours, *(peer(x) for peer in peers.values())], 30, device)
            mine, *theirs = (statistics.median(found) for found in times)
            for name, seconds in zip(peers, theirs, strict=True):
                print_result(f"times_ours/{name}/{rows}x{cols}/batch{batch}", seconds / mine, 1.0)


class Stock:
    """Random weights in fragments, made once for each format and shape."""

    def __init__(self, device: torch.device, beyond: int = BEYOND) -> None:
        self.device, self.beyond = device, beyond
        self.made: dict[tuple[str, int, int], list[list[torch.Tensor]]] = {}

    def contestant(self, scheme: str, rows: int, cols: int, x: torch.Tensor) -> Contestant:
        """Products with each copy of the weight."""
        key = (scheme, rows, cols)
        if key not in self.made:
            matrix = torch.randn(rows, cols, device=self.device)
            arranged = to_layout(pack(quantize(matrix, parse_format(scheme))), FRAGMENTS)
            self.made[key] = copies(list(arranged.tensors.values()), self.beyond)
        facts = (scheme, rows, cols, FRAGMENTS, "")
        return Contestant([partial(torch.ops.mpq.linear, x, weight, None, *facts) for weight in self.made[key]])


def mixed(device: torch.device, quick: bool) -> None:
    """Time random allocations of a stack of linear layers, one graph each, against the latency table's sum."""
    block = {(512, 512): 4} if quick else BLOCK
    blocks, batches, count = (2, [1], 1) if quick else (BLOCKS, MIXED_BATCHES, ALLOCATIONS)
    timings = list(measure(MIXED, list(block), batches, repeats=5 if quick else 30, device=device))
    table: LatencyTable = latency_table(timings, device)
    layers = [shape for _ in range(blocks) for shape, number in block.items() for _ in range(number)]
    random, stock = np.random.default_rng(0), Stock(device)
    for batch in batches:
        inputs = {cols: torch.randn(batch, cols, device=device).bfloat16() for _, cols in block}
        worst = 0.0
        for place in range(count):
            schemes = random.choice(MIXED, len(layers))
            pairs = list(zip(schemes.tolist(), layers, strict=True))
            turns = {pair: cycle(stock.contestant(pair[0], *pair[1], inputs[pair[1][1]]).calls) for pair in pairs}
            stack = [next(turns[pair]) for pair in pairs]
            (times,) = interleaved([Contestant([lambda stack=stack: [call() for call in stack]])], 5, device)
            seconds = statistics.median(times)
            predicted = sum(table.seconds(scheme, *shape, batch) for scheme, shape in pairs)
            worst = max(worst, abs(seconds / predicted - 1))
            print(f"mixed allocation {place}, batch {batch}: {1e3 * seconds:.3f} ms, table {1e3 * predicted:.3f} ms")
        print_result(f"mixed_allocations_off_the_table/batch{batch}", worst, 0.10, most=True)


def print_result(name: str, value: float, goal: float, most: bool = False) -> None:
    met = value <= goal if most else value >= goal
    print(result(name, value, f"{'<=' if most else '>='}{goal}", met), flush=True)


if __name__ == "__main__":
    main()
