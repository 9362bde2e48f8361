"""`mpq export`: write the packed weights of an allocation."""

import argparse
from pathlib import Path

from mpq.cli import recipe
from mpq.cli.options import AddCommand, check_data, model_options, output_name, source_of
from mpq.cli.say import say


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    export = command("export", run, "write the packed weights of an allocation")
    model_options(export)
    export.add_argument("allocation", help="allocation that 'mpq allocate' wrote")
    export.add_argument("--method", help="rounding method (default: the one that the allocation was searched for)")
    export.add_argument("--to", default="mpq", help="target: mpq (default), compressed-tensors, gguf, ...")
    export.add_argument(
        "--table",
        help="the allocation's table, for solving again with the target's formats (default: the one in its folder)",
    )
    export.add_argument(
        "--strict",
        action="store_true",
        help="fail on schemes that the target does not support, instead of solving again",
    )
    export.add_argument(
        "--no-measure", action="store_true", help="do not measure quality, unless the allocation is solved again"
    )
    export.add_argument("--force", action="store_true", help="overwrite a result of other settings")
    export.add_argument("-o", "--output", type=output_name, required=True, help="folder to write")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.comparison import megabytes
    from mpq.core.allocation import Allocation
    from mpq.core.table import SensitivityTable
    from mpq.exporters.caches import check_cache
    from mpq.exporters.holding import check_model, check_packages
    from mpq.exporters.targets import TARGETS
    from mpq.resolving import held_or_resolved, table_beside
    from mpq.rounding import DEFAULT_METHOD, METHODS

    steps = recipe.recipe_of(options)
    recipe.check_output(options.output, steps, options.force)
    allocation, target = Allocation.load(options.allocation), TARGETS.named(options.to)
    method = options.method or allocation.provenance.get("method", DEFAULT_METHOD)
    METHODS.named(method)
    check_data(options.dataset)
    check_packages(target)
    file = Path(options.allocation)
    table = SensitivityTable.load(options.table) if options.table else table_beside(allocation, file)
    resolved = held_or_resolved(target, allocation, table, options.strict)
    allocation = allocation if resolved is None else resolved.allocation
    check_cache(target, allocation)

    from mpq.exported_folder import export_folder
    from mpq.measuring import store_for

    source = source_of(options)
    check_model(target, source.model)
    store = store_for(method, source, allocation.layers)
    exported = export_folder(
        source, allocation, options.output, target=options.to, store=store, resolved=resolved,
        measure=resolved is not None or not options.no_measure, progress=not options.quiet,
    )  # fmt: skip
    written = exported.folder
    if written.is_dir():
        recipe.begin(options.output, steps)
        recipe.finish(options.output)
    for sentence in exported.words():
        say(options, sentence)
    files = [written] if written.is_file() else [path for path in written.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    say(options, f"{written}: {megabytes(size)}, {allocation.bits:.3f} bits per weight")
