"""Fused CPU kernels against the machine's read bandwidth and PyTorch's floats, and the latency table they make.

    python experiments/bench_cpu_kernels.py [--quick] [--table latency.json]

Contestants take turns within one run, weights rotate beyond the cache, figures are medians. The last lines compare
with the goals: a fraction of the read bandwidth at batch 1, no slower than bfloat16 at batch 64 and 256.
"""

import argparse

import torch

from mpq.kernels import cpu
from mpq.kernels.bench import latency_table, measure

GOALS = {
    "int8-channel": 0.90, "int4-g128": 0.90, "mxfp4": 0.90, "int2-g128": 0.85, "fp8-e4m3-channel": 0.85,
    "nf4-g64": 0.85, "nvfp4": 0.85, "int3-g128": 0.80, "int5-g128": 0.80, "int6-g128": 0.80,
    "fp6-e2m3-channel": 0.80, "fp6-e3m2-channel": 0.80,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, three formats")
    parser.add_argument("--table", help="where to write the latency table")
    arguments = parser.parse_args()
    schemes = list(GOALS)[:3] if arguments.quick else [*GOALS, "int4-g128+a:int8-token"]
    shapes = [(1024, 1024)] if arguments.quick else [(4096, 4096), (11008, 4096), (4096, 11008)]
    batches = [1, 64] if arguments.quick else [1, 4, 16, 64, 256]
    beyond = 64 * 2**20 if arguments.quick else 256 * 2**20
    print(f"instructions {cpu.level_name()}, {torch.get_num_threads()} threads")
    print(f"{'scheme':24} {'shape':>12} batch {'us':>9} {'GB/s':>6} {'of roof':>7} {'x float32':>9} {'x bf16':>7}")
    found = []
    for timing in measure(schemes, shapes, batches, repeats=30, beyond=beyond):
        found.append(timing)
        print(
            f"{timing.scheme:24} {f'{timing.rows}x{timing.cols}':>12} {timing.batch:5} {1e6 * timing.seconds:9.0f} "
            f"{timing.nbytes / timing.seconds / 1e9:6.1f} {timing.roof:7.0%} {timing.float32 / timing.seconds:9.2f} "
            f"{timing.bfloat16 / timing.seconds:7.2f}",
            flush=True,
        )
    if arguments.table:
        latency_table(found).save(arguments.table)
    for timing in found:
        name = f"{timing.scheme}/{timing.rows}x{timing.cols}/batch{timing.batch}"
        if timing.batch == 1 and timing.scheme in GOALS:
            goal = GOALS[timing.scheme]
            print(f"RESULT roof/{name} {timing.roof:.3f} {goal} {'ok' if timing.roof >= goal else 'short'}")
        elif timing.batch >= 64:
            gain = timing.bfloat16 / timing.seconds
            print(f"RESULT speedup_over_bf16/{name} {gain:.2f} 1 {'ok' if gain >= 1 else 'short'}")


if __name__ == "__main__":
    main()
