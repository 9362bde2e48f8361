"""`mpq formats`: the number formats."""

import argparse
import math
from collections.abc import Sequence

from mpq.cli.options import AddCommand, print_table


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    formats = command("formats", run, "list number formats, or describe some of them")
    formats.add_argument("names", nargs="*", help="formats whose values to print")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.formats import FORMATS
    from mpq.core.scheme import parse_scheme

    for name in options.names:
        format = parse_scheme(name).weight
        print(f"{format.name}: {format.effective_bits():.4f} bits per weight of a 4096 x 4096 matrix")
        if format.grid.bits <= 8 and len(format.members) == 1:
            numbers = sorted({value for value in format.grid.values().tolist() if math.isfinite(value)})
            print("  " + " ".join(f"{value:g}" for value in numbers))
    if options.names:
        return
    rows: list[Sequence[str]] = [("format", "bits", "codes", "scale", "minimum", "shared by", "range of codes")]
    for name, format in FORMATS.items():
        shared = {"group": f"{format.group_size}", "channel": "a channel", "tensor": "the tensor", "none": "-"}
        outer = " x fp32" if format.tensor_scale else " x fp16" if format.super_group else ""
        scale = "-" if format.is_float_copy else format.scale + outer
        minimum = format.minimum + (outer if format.minimum else "") or "-"
        low, high = format.grid.min, format.grid.max
        bits = f"{format.effective_bits():.3f}"
        rows.append((name, bits, format.grid.name, scale, minimum, shared[format.granularity], f"{low:g} to {high:g}"))
    print_table(rows)
    grammar = "GRID[-tensor|-channel|-gN][-asym][-sSCALE][-mMINIMUM][-bN][-ts]"
    print(f"\n{grammar}; bits per weight of a 4096 x 4096 matrix, scales included")
    print("FORMAT/FORMAT/...@BITS: a mix, each row in one of these formats, at this average of stored bits per weight")
