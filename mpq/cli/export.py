"""`mpq export`: packed weights of an allocation."""

import argparse

from mpq.cli import recipe
from mpq.cli.options import AddCommand, check_data, model_options, source_of
from mpq.cli.say import say


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    export = command("export", run, "write the packed weights of an allocation")
    model_options(export)
    export.add_argument("allocation", help="what 'mpq allocate' wrote")
    export.add_argument("--method", help="rounding method (default: the one that the allocation was searched for)")
    export.add_argument("--to", default="mpq", help="mpq (default), compressed-tensors, gguf, ...")
    export.add_argument("--force", action="store_true", help="overwrite a result of other settings")
    export.add_argument("-o", "--output", required=True, help="folder to write")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.comparison import megabytes
    from mpq.core.allocation import Allocation
    from mpq.exporters.targets import TARGETS
    from mpq.rounding import DEFAULT_METHOD, METHODS

    steps = recipe.recipe_of(options)
    recipe.check_output(options.output, steps, options.force)
    allocation = Allocation.load(options.allocation)
    TARGETS.named(options.to)
    method = options.method or allocation.provenance.get("method", DEFAULT_METHOD)
    METHODS.named(method)
    check_data(options.dataset)

    from mpq.exporting import export_to

    written = export_to(options.to, source_of(options), allocation, options.output, method)
    if written.is_dir():
        recipe.begin(options.output, steps)
        recipe.finish(options.output)
    files = [written] if written.is_file() else [path for path in written.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    say(options, f"{written}: {megabytes(size)}, {allocation.bits:.3f} bits per weight")
