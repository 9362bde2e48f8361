"""Times of the CUDA kernels: microseconds, GB/s, share of the copy bandwidth, speed-up over bf16.

Without a GPU it says so; with --quick it then runs one small product in Triton's interpreter, whose times mean nothing.
    python experiments/bench_gpu_kernels.py [--quick] [--tune]
"""

import argparse
import os

import torch

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
BATCHES = [1, 4, 16, 32, 64, 128, 256]
FORMATS = ["int4-g128", "int2-g128", "int3-g128", "int8-channel", "fp8-e4m3-channel", "mxfp4", "nvfp4", "nf4-g64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--tune", action="store_true", help="tune int4-g128 first, into the user's cache folder")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        print("no CUDA device here: the kernels' speeds are not measured")
        if not options.quick:
            return
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        from mpq.kernels.triton.bench import bench, tune
    except ImportError:
        print("Triton is not installed: pip install triton")
        return
    device = torch.device("cuda" if cuda else "cpu")
    shapes = [(512, 512) if cuda else (64, 128)] if options.quick else SHAPES
    batches = [1, 16] if options.quick else BATCHES
    formats = FORMATS[:1] if options.quick else FORMATS
    if options.tune and cuda:
        for rows, cols in shapes:
            for tokens in batches:
                tune("int4-g128", rows, cols, tokens, device)
    print(torch.cuda.get_device_name(device) if cuda else "Triton's interpreter (correctness only)")
    print(f"{'format':<18} {'rows':>6} {'cols':>6} {'batch':>5} {'us':>9} {'GB/s':>8} {'copy':>6} {'x bf16':>7}")
    timings = bench(formats, shapes, batches, device)
    for row in timings:
        print(
            f"{row.format:<18} {row.rows:>6} {row.cols:>6} {row.tokens:>5} {row.microseconds:>9.1f} "
            f"{row.gigabytes:>8.2f} {row.of_copy:>6.1%} {row.speedup:>7.2f}"
        )
    if cuda and not options.quick:
        large = [row for row in timings if row.format == "int4-g128" and row.rows > 4096 and row.tokens <= 16]
        share = min(row.of_copy for row in large)
        print(f"RESULT int4_share_of_copy_bandwidth {share:.3f} 0.85 {'ok' if share >= 0.85 else 'short'}")
    else:
        print(f"RESULT gpu_products_run {len(timings)} {len(timings)} ok")


if __name__ == "__main__":
    main()
