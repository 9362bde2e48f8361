"""`mpq bench`: time packed layers and attention."""

import argparse
from typing import TYPE_CHECKING

from mpq.cli.options import AddCommand, kv_formats_of, output_name, print_table
from mpq.core.errors import MpqError

if TYPE_CHECKING:
    import torch

    from mpq.kernels.bench_attention import AttentionTiming


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    bench = command("bench", run, "time packed layers on this machine, for searches with measured latency")
    bench.add_argument(
        "--formats",
        default="int2-g128,int3-g128,int4-g128,int2-g128/int4-g128@3.125,int8-channel,mxfp4,nvfp4,nf4-g64",
        help="formats, comma-separated; a mix by rows is written int2-g128/int4-g128@3.125",
    )
    bench.add_argument(
        "--shapes", default="4096x4096", help="rows x columns of layers, comma-separated (default: 4096x4096)"
    )
    bench.add_argument("--batches", default="1,16", help="batch sizes in tokens, comma-separated (default: 1,16)")
    bench.add_argument(
        "--attention", metavar="SHAPES", help="also time attention with heads x key heads x width, e.g. 32x8x128"
    )
    bench.add_argument(
        "--contexts", default="4096", help="context lengths of attention, comma-separated (default: 4096)"
    )
    bench.add_argument("--kv-formats", help="formats of keys and values (default: all candidates of a search)")
    bench.add_argument("--repeats", type=int, default=30, help="timed calls of each kernel")
    bench.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    bench.add_argument(
        "--inputs",
        choices=("float32", "bfloat16", "float16"),
        help="type of the layers' inputs (default: float32; on a GPU bfloat16)",
    )
    bench.add_argument("--tune", action="store_true", help="GPU: first tune and store the kernels' block sizes")
    bench.add_argument("--list", action="store_true", help="print the kernels of the device and exit")
    bench.add_argument(
        "-o", "--output", type=output_name, help="latency table to write, a .json file for 'mpq allocate --latency'"
    )


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
            f"invalid shapes {options.shapes!r} or batches {options.batches!r}: expected e.g. 4096x4096 and 1,16"
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
    attention = [timing.latency for timing in _attention(options, batches, device)] if options.attention else []
    if options.output:
        latency_table(timings, device, attention).save(options.output)


def _attention(options: argparse.Namespace, batches: list[int], device: "torch.device") -> "list[AttentionTiming]":
    """Time attention and print the results."""
    from mpq.core.cache import CACHE_FORMATS
    from mpq.kernels.bench_attention import measure_attention

    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.attention.split(",")]
        heads = [(count, keys, width) for count, keys, width in shapes]
        contexts = [int(context) for context in options.contexts.split(",")]
    except ValueError as error:
        raise MpqError(
            f"invalid attention {options.attention!r} or contexts {options.contexts!r}: expected e.g. 32x8x128 and 4096"
        ) from error
    formats = kv_formats_of(options) or CACHE_FORMATS
    timings = list(measure_attention(heads, contexts, batches, formats, repeats=options.repeats, device=device))
    rows = [("cache", "heads", "context", "batch", "of", "us", "GB/s")]
    for one in timings:
        speed = f"{one.nbytes / one.seconds / 1e9:.1f}" if one.seconds else ""
        where = (one.format, "x".join(map(str, one.heads)), str(one.context), str(one.batch), one.kind)
        rows.append((*where, _microseconds(one.seconds), speed))
    print_table(rows)
    return timings


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def _tune(schemes: list[str], sizes: list[tuple[int, int]], batches: list[int], device: "torch.device") -> None:
    if device.type != "cuda":
        raise MpqError("--tune is for GPU kernels: add --device cuda")
    try:
        from mpq.kernels.gpu.triton.tune import tune
    except ImportError:
        raise MpqError("--tune needs Triton: pip install triton") from None
    for scheme in schemes:
        for rows, cols in sizes:
            for batch in batches:
                tune(scheme, rows, cols, batch, device)
