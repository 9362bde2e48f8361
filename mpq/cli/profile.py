"""`mpq profile`: a sensitivity table."""

import argparse

from mpq.cli.options import (
    AddCommand,
    kv_formats_of,
    kv_formats_option,
    model_options,
    output_name,
    profile_options,
    profiling_of,
    source_of,
)
from mpq.cli.say import coverage_line, say


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    profile = command("profile", run, "measure each layer's sensitivity to each format")
    model_options(profile)
    profile_options(profile)
    kv_formats_option(profile)
    profile.add_argument(
        "--offload", action="store_true", help="keep the weights in main memory, one module at a time on --device"
    )
    profile.add_argument("-o", "--output", type=output_name, required=True, help="table to write, a .csv file")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.formats import DEFAULT_FORMATS
    from mpq.network.parallel import own_device, processes, rank_and_count
    from mpq.sensitivity.profile import profile

    settings, kv_formats = profiling_of(options), kv_formats_of(options)
    settings["formats"] = settings["formats"] or DEFAULT_FORMATS
    source = source_of(options, stay=options.offload)
    with processes(options.device):
        table = profile(
            source.model, source.calibration, source.loss_fn, resume=f"{options.output}.unfinished",
            provenance=source.provenance(), cache=kv_formats or (),
            offload=own_device(options.device) if options.offload else None, **settings,
        )  # fmt: skip
        if rank_and_count()[0] > 0:
            return
    table.save(options.output)
    say(options, f"{options.output}: {len(table.layers)} layers x {len(table.schemes)} formats, metric {table.metric}")
    say(options, coverage_line(table))
