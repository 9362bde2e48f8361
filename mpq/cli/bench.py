"""`mpq bench`: packed layers, timed."""

import argparse
from typing import TYPE_CHECKING

from mpq.cli.options import AddCommand, print_table
from mpq.core.errors import MpqError

if TYPE_CHECKING:
    import torch


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    bench = command("bench", run, "time packed layers on this machine, for searches with measured latency")
    bench.add_argument(
        "--formats",
        default="int2-g128,int3-g128,int4-g128,int2-g128/int4-g128@3.125,int8-channel,mxfp4,nvfp4,nf4-g64",
        help="separated by commas; a mix of rows as int2-g128/int4-g128@3.125",
    )
    bench.add_argument("--shapes", default="4096x4096", help="rows x columns of layers (default: 4096x4096)")
    bench.add_argument("--batches", default="1,16", help="tokens at a time (default: 1,16)")
    bench.add_argument("--repeats", type=int, default=30, help="timed calls of each")
    bench.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    bench.add_argument(
        "--inputs",
        choices=("float32", "bfloat16", "float16"),
        help="type of what comes in (default: float32; on a GPU bfloat16)",
    )
    bench.add_argument("--tune", action="store_true", help="on a GPU: choose blocks by timing first, and keep them")
    bench.add_argument("--list", action="store_true", help="say which kernels the device runs, and stop")
    bench.add_argument("-o", "--output", help="latency table to write, a .json file for 'mpq allocate --latency'")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from mpq.kernels.bench import describe, device_of, latency_table, measure

    device = device_of(options.device)
    print(describe(device))
    if options.list:
        return
    try:
        shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes.split(",")]
        batches = [int(batch) for batch in options.batches.split(",")]
        sizes = [(rows, cols) for rows, cols in shapes]
    except ValueError as error:
        raise MpqError(
            f"shapes are written 4096x4096,..., batches 1,16,...: not {options.shapes}, {options.batches}"
        ) from error
    schemes = options.formats.split(",")
    if options.tune:
        _tune(schemes, sizes, batches, device)
    of_roof = "of copy" if device.type == "cuda" else "of read"
    rows = [("format", "rows x cols", "batch", "us", "GB/s", of_roof, "x float32", "x bf16")]
    timings = []
    dtype = getattr(torch, options.inputs) if options.inputs else None
    for timing in measure(schemes, sizes, batches, repeats=options.repeats, dtype=dtype, device=device):
        timings.append(timing)
        speed = f"{timing.nbytes / timing.seconds / 1e9:.1f}"
        ratios = (f"{timing.float32 / timing.seconds:.2f}", f"{timing.bfloat16 / timing.seconds:.2f}")
        where = (timing.scheme, f"{timing.rows} x {timing.cols}", str(timing.batch), _microseconds(timing.seconds))
        rows.append((*where, speed, f"{100 * timing.roof:.0f} %", *ratios))
    print_table(rows)
    if options.output:
        latency_table(timings, device).save(options.output)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def _tune(schemes: list[str], sizes: list[tuple[int, int]], batches: list[int], device: "torch.device") -> None:
    if device.type != "cuda":
        raise MpqError("--tune chooses blocks of the GPU kernels: it needs --device cuda")
    try:
        from mpq.kernels.gpu.triton.tune import tune
    except ImportError:
        raise MpqError("--tune needs Triton: pip install triton") from None
    for scheme in schemes:
        for rows, cols in sizes:
            for batch in batches:
                tune(scheme, rows, cols, batch, device)
