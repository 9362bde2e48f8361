"""`mpq quantize`: the whole job."""

import argparse

from mpq.cli.options import (
    AddCommand,
    budget_options,
    choice_options,
    model_options,
    pairs_of,
    print_table,
    profile_options,
    profiling_of,
    source_of,
)
from mpq.cli.say import summary


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    quantize = command("quantize", run, "profile, search, export and measure a model")
    model_options(quantize)
    profile_options(quantize)
    budget_options(quantize)
    choice_options(quantize)
    quantize.add_argument("--for", dest="consumer", default="mpq", help="who will run it: vllm, llama.cpp, ... or mpq")
    quantize.add_argument(
        "--effort", default="normal", help="how much is measured before choosing: fast, normal (default) or best"
    )
    quantize.add_argument("--table", help="a table made before, instead of profiling")
    quantize.add_argument("-o", "--output", required=True, help="folder to write")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.table import SensitivityTable
    from mpq.pipeline import quantize_model

    settings, pin = profiling_of(options), pairs_of(options.pin, "pin")
    table = SensitivityTable.load(options.table) if options.table else None
    outcome = quantize_model(
        source_of(options), options.output, bits=options.bits, size=options.size, table=table, pin=pin,
        ties=not options.no_ties, trust=options.trust, consumer=options.consumer, effort=options.effort, **settings,
    )  # fmt: skip
    from mpq.report import HEADINGS

    print_table([HEADINGS, *(row[:-1] for row in outcome.rows())])
    print(f"\n{summary(outcome.frontier, outcome.allocation)}")
    for sentence in outcome.words():
        print(sentence)
    print(f"written to {outcome.folder}: packed weights, table, frontier, report.html")
