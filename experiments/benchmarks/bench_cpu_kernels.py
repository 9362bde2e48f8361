"""Fused CPU kernels against the machine's read bandwidth and PyTorch's floats, and the latency table they make.

    python -m experiments.benchmarks.bench_cpu_kernels [--quick] [--table latency.json]
    python -m experiments.benchmarks.bench_cpu_kernels --peers [--shapes 4096x4096] [--batches 1,4,16]
        [--formats int4-g128]
    python -m experiments.benchmarks.bench_cpu_kernels --show | --mixed

Contestants alternate within one run, cycling through copies of the weights defeats the cache, figures are medians. The
last lines compare with the goals: a fraction of the read bandwidth at batch 1, through the op and (kernel) for the
compiled call alone; no slower than PyTorch's bfloat16 at batch 64 and 256, for bfloat16 and for float32 inputs. --peers
times other libraries instead (cpu_peers.py) and appends their figures to results/cpu_kernels.csv; --mixed times ten
random allocations of a stack of layers against the sum of their layers' times alone.
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.peers import cpu_peers
from experiments.result import result
from mpq.core.scheme import parse_scheme
from mpq.kernels.bench import BEYOND, CPU, PAGE, Timing, latency_table, measure, streaming
from mpq.kernels.clock import Contestant, copies, interleaved
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu.pages import on_large_pages
from mpq.kernels.layout import Packed, best_layout, pack, to_layout
from mpq.network.calibration import seeded
from mpq.rounding.reference import quantize

COLUMNS = ("cpu", "threads", "format", "rows", "cols", "batch", "contestant", "median_us", "q1_us", "q3_us")
MIXED = ("int2-g128", "int3-g128", "int4-g128", "int6-g128", "int8-channel", "nf4-g64", "mxfp4", "fp8-e4m3-channel")
MIXED_SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
RESULTS = Path(__file__).parents[1] / "results" / "cpu_kernels.csv"

GOALS = {
    "int8-channel": 0.90, "int4-g128": 0.90, "mxfp4": 0.90, "int2-g128": 0.85, "fp8-e4m3-channel": 0.85,
    "nf4-g64": 0.85, "nvfp4": 0.85, "int3-g128": 0.80, "int5-g128": 0.80, "int6-g128": 0.80,
    "fp6-e2m3-channel": 0.80, "fp6-e3m2-channel": 0.80,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, three formats")
    parser.add_argument("--table", help="where to write the latency table")
    parser.add_argument("--peers", action="store_true", help="against other libraries, in an environment of their own")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of --peers, after which no batch is begun")
    parser.add_argument("--show", action="store_true", help="print what results/cpu_kernels.csv says of peers")
    parser.add_argument("--mixed", action="store_true", help="ten random mixed allocations against the latency table")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008")
    parser.add_argument("--batches", default="1,4,16,64,256")
    parser.add_argument("--formats", default=",".join([*GOALS, "int4-g128+a:int8-token"]))
    arguments = parser.parse_args()
    schemes = list(GOALS)[:3] if arguments.quick else arguments.formats.split(",")
    written = "1024x1024" if arguments.quick else arguments.shapes
    shapes = [(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in written.split(","))]
    batches = [1, 64] if arguments.quick else [int(batch) for batch in arguments.batches.split(",")]
    beyond = 64 * 2**20 if arguments.quick else BEYOND
    print(f"instructions {cpu.level_name()}, {torch.get_num_threads()} threads")
    if arguments.show:
        show()
    elif arguments.peers:
        against_peers(schemes, shapes, batches, arguments.seconds)
        show()
    elif arguments.mixed:
        mixed()
    else:
        alone(schemes, shapes, batches, beyond, arguments.table)
    if arguments.quick:
        mixed(layers=6, blocks=1, beyond=2**27)


def alone(
    schemes: list[str], shapes: list[tuple[int, int]], batches: list[int], beyond: int, table: str | None
) -> None:
    """Time our formats against reading memory and PyTorch's floats, float32 inputs first."""
    single = timed(schemes, shapes, batches, beyond, torch.float32)
    half = timed(schemes, shapes, [batch for batch in batches if batch > 1], beyond, torch.bfloat16)
    if table:
        latency_table(single).save(table)
    for timing in single:
        if timing.batch == 1 and timing.scheme in GOALS:
            where = f"{timing.scheme}/{timing.rows}x{timing.cols}/batch1"
            goal, bare = GOALS[timing.scheme], kernel_share(timing.scheme, timing.rows, timing.cols, beyond)
            print(result(f"roof/{where}", timing.roof, f">={goal}", timing.roof >= goal))
            print(result(f"kernel_roof/{where}", bare, f">={goal}", bare >= goal))
    for inputs, timings in {"bfloat16": half, "float32": single}.items():
        for timing in timings:
            where = f"{timing.scheme}/{timing.rows}x{timing.cols}/batch{timing.batch}/{inputs}_inputs"
            gain = timing.bfloat16 / timing.seconds
            if timing.batch >= 64:
                print(result(f"over_bf16/{where}", gain, ">=1", gain >= 1))


def timed(
    schemes: list[str], shapes: list[tuple[int, int]], batches: list[int], beyond: int, dtype: torch.dtype
) -> list[Timing]:
    """Time everything in the plan, printing each figure as it is measured."""
    print(f"\n{'scheme, ' + str(dtype)[6:] + ' inputs':34} {'shape':>12} batch {'us':>9} {'GB/s':>6} {'of roof':>7} "
          f"{'x float32':>9} {'x bf16':>7}")  # fmt: skip
    found = []
    for timing in measure(schemes, shapes, batches, repeats=30, beyond=beyond, dtype=dtype):
        found.append(timing)
        print(
            f"{timing.scheme:34} {f'{timing.rows}x{timing.cols}':>12} {timing.batch:5} {1e6 * timing.seconds:9.0f} "
            f"{timing.nbytes / timing.seconds / 1e9:6.1f} {timing.roof:7.0%} {timing.float32 / timing.seconds:9.2f} "
            f"{timing.bfloat16 / timing.seconds:7.2f}",
            flush=True,
        )
    return found


def kernel_share(scheme: str, rows: int, cols: int, beyond: int) -> float:
    """The compiled call for one token as a fraction of the read bandwidth, without PyTorch's dispatch."""
    arranged, x, out = (
        weight(scheme, rows, cols),
        torch.randn((1, cols), generator=seeded(1, cols)),
        torch.empty(1, rows),
    )
    weights = copies(list(arranged.tensors.values()), beyond, on_large_pages)
    calls = [cpu.prepared(x, tensors, out, arranged.format.name) for tensors in weights]
    ours, read = interleaved([Contestant(calls), streaming(CPU, beyond)], 60, CPU)
    return arranged.nbytes / statistics.median(ours) / (PAGE["cpu"] / statistics.median(read))


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def weight(scheme: str, rows: int, cols: int) -> Packed:
    """A random weight in the CPU kernels' layout."""
    dense = torch.randn((rows, cols), generator=seeded(0, rows, cols))
    packed = pack(quantize(dense, parse_scheme(scheme).weight))
    return to_layout(packed, best_layout(packed, CPU))


def stacked(scheme: str, rows: int, cols: int, count: int, dtype: torch.dtype = torch.float32):
    """A function that multiplies by each copy of a random weight and returns the seconds per copy."""
    arranged, activation = weight(scheme, rows, cols), parse_scheme(scheme).activation
    facts = (arranged.format.name, rows, cols, arranged.layout, "" if activation is None else activation.name)
    weights = copies(list(arranged.tensors.values()), count * arranged.nbytes, on_large_pages)  # as in a model

    linear, plain = torch.ops.mpq.linear.default, dtype == torch.float32

    @torch.inference_mode()
    def run(x: torch.Tensor) -> float:
        started = time.perf_counter()
        for tensors in weights:
            if plain:
                linear(x, tensors, None, *facts)
            else:
                linear(x.to(dtype), tensors, None, *facts).to(x.dtype)
        return (time.perf_counter() - started) / len(weights)

    return run


def own_modes(scheme: str) -> dict[str, tuple[str, torch.dtype]]:
    """Our modes: activations of about 15 bits; for integer weights also 8 bits, as most peers compute; and bfloat16.

    With bfloat16, conversions of inputs and outputs are part of the time, as for the peers.
    """
    found = {"ours": (scheme, torch.float32)}
    if scheme.startswith("int"):
        found["ours in int8"] = scheme + "+a:int8-token", torch.float32
    return found | {"ours in bf16": (scheme, torch.bfloat16)}


def against_peers(
    schemes: list[str], shapes: list[tuple[int, int]], batches: list[int], seconds: float, repeats: int = 31
) -> None:
    """Whole passes over all copies of a weight, ours and each peer's alternating; idle peers sleep.

    Each batch's rows are written as soon as they are measured; no batch starts after `seconds`.
    """
    processor, began = processor_name(), time.monotonic()
    for scheme in schemes:
        names = cpu_peers.PEERS.get(scheme, ())
        for rows, cols in shapes if names else ():
            beyond = max(2, BEYOND // parse_scheme(scheme).weight.nbytes(rows, cols))
            # many tokens are compute-bound: two copies suffice
            for some, count in (([b for b in batches if b < 64], beyond), ([b for b in batches if b >= 64], 2)):
                peers = [cpu_peers.product(name, rows, cols, count, torch.get_num_threads()) for name in names if some]
                modes = own_modes(scheme) if some else {}
                ours = {name: stacked(full, rows, cols, count, dtype) for name, (full, dtype) in modes.items()}
                up = [peer for peer in peers if peer.ready()]
                for missing in {peer.name for peer in peers} - {peer.name for peer in up}:
                    print(f"{missing} is left out: it did not start for {rows}x{cols}")
                for batch in some:
                    if time.monotonic() - began > seconds:
                        print(f"{scheme} {rows}x{cols} batch {batch} is left out: {seconds:.0f} s are over")
                        continue
                    found = take_turns(ours, up, torch.randn((batch, cols), generator=seeded(1, batch)), repeats)
                    where = (processor, torch.get_num_threads(), scheme, rows, cols, batch)
                    write([(*where, name, *quartiles(times)) for name, times in found.items()])
                for peer in peers:
                    peer.close()


def take_turns(ours, peers: list[cpu_peers.Peer], x: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds per call of each contestant, without the first turn."""
    found: dict[str, list[float]] = {name: [] for name in (*ours, *(peer.name for peer in peers))}
    for _ in range(repeats + 1):
        for name, run in ours.items():
            found[name].append(run(x))
            time.sleep(0.005)  # until threads that spin after their work are asleep
        for peer in peers:
            found[peer.name].append(peer.answer(len(x))[0])
            time.sleep(0.005)
    return {name: times[1:] for name, times in found.items()}


def quartiles(times: list[float]) -> tuple[str, ...]:
    """Median, first and third quartile in microseconds."""
    return tuple(f"{1e6 * value:.1f}" for value in np.percentile(times, [50, 25, 75]))


def write(rows: list[tuple]) -> None:
    """Append rows to the table and print them."""
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if fresh else rows)
    for _, _, scheme, height, width, batch, name, median, low, high in rows:
        print(f"{scheme:18} {height}x{width} {batch:4} {name:18} {median:>9} us ({low} to {high})", flush=True)


def show() -> None:
    """Print the table's RESULT lines: the last measurement of each weight and batch."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = row["format"], f"{row['rows']}x{row['cols']}", row["batch"]
        if row["contestant"] == "ours":  # a measurement begins
            last[key] = {}
        last[key][row["contestant"]] = float(row["median_us"])
    for (scheme, shape, batch), medians in last.items():
        peers = [(median, name) for name, median in medians.items() if not name.startswith("ours") and median == median]
        if not peers:
            continue
        fastest, name = min(peers)
        goal = {"1": 1.25, "4": 1.5, "16": 1.5}.get(batch, 1.0)
        for mode in ("ours", "ours in bf16"):
            if mode in medians:
                gain = fastest / medians[mode]
                print(result(f"over_{name}/{scheme}/{shape}/batch{batch}{mode[4:]}", gain, f">={goal}", gain >= goal))


@torch.inference_mode()
def mixed(layers: int = 28, blocks: int = 10, beyond: int = 4 * BEYOND) -> None:
    """Time ten random allocations of a stack of square and oblong layers against the latency table of the same run.

    A stack's copies fill as much memory as the table's four contestants cycle through together: with 150 MB, a third of
    the weights would still be in the cache.
    """
    random = np.random.default_rng(0)
    seconds = {
        (timing.scheme, timing.rows, timing.cols): timing.seconds
        for timing in measure(MIXED, MIXED_SHAPES, [1], repeats=max(5, 3 * blocks), beyond=beyond // 4)
    }
    arranged = {key: weight(*key) for key in seconds}
    x = {cols: torch.randn((1, cols), generator=seeded(1, cols)) for _, cols in MIXED_SHAPES}
    worst = 0.0
    for number in range(10):
        chosen = [
            (MIXED[random.integers(len(MIXED))], *MIXED_SHAPES[random.integers(len(MIXED_SHAPES))])
            for _ in range(layers)
        ]
        nbytes = sum(arranged[key].nbytes for key in chosen)
        stacks = [[placed(arranged[key], x[key[2]]) for key in chosen] for _ in range(-(-beyond // nbytes))]
        times = []
        for _ in range(blocks + 1):
            for stack in stacks:
                started = time.perf_counter()
                for call in stack:
                    call()
                times.append(time.perf_counter() - started)
        measured, predicted = statistics.median(times[len(stacks) :]), sum(seconds[key] for key in chosen)
        worst = max(worst, abs(measured / predicted - 1))
        print(f"mixed allocation {number}: {1e3 * measured:.2f} ms measured, {1e3 * predicted:.2f} ms by the table")
    print(result("mixed_allocations_off_the_table", worst, "<=0.1", worst <= 0.1))


def placed(packed: Packed, x: torch.Tensor) -> Callable[[], object]:
    """The product by a copy of the weight, placed in memory as a model's weights are."""
    tensors = [on_large_pages(tensor) for tensor in packed.tensors.values()]
    return partial(torch.ops.mpq.linear.default, x, tensors, None, packed.format.name, *packed.shape, packed.layout, "")


if __name__ == "__main__":
    main()
