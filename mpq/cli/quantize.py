"""`mpq quantize`: the whole job."""

import argparse

from mpq.cli import recipe
from mpq.cli.options import (
    AddCommand,
    budget_options,
    budgets_of,
    choice_options,
    further_budgets,
    kv_formats_of,
    kv_formats_option,
    memory_options,
    model_options,
    output_name,
    pins_of,
    print_table,
    profile_options,
    profiling_of,
    size_of,
    source_of,
    target_option,
)
from mpq.cli.say import allocation_facts, coverage_line, say, say_json, summary


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    quantize = command("quantize", run, "profile, search, export and measure a model")
    model_options(quantize, required=False)
    profile_options(quantize)
    budget_options(quantize, divergence=True, required=False)
    memory_options(quantize)
    kv_formats_option(quantize)
    further_budgets(quantize)
    quantize.add_argument(
        "--batch", type=int, default=1, help="batch size: tokens for --latency, texts for --memory (default: 1)"
    )
    choice_options(quantize)
    target_option(quantize, "mpq")
    quantize.add_argument(
        "--effort", default="normal", help="how much to measure before choosing: fast, normal (default) or best"
    )
    quantize.add_argument(
        "--tuning-steps", type=int, metavar="N",
        help="steps of tuning scales against the original model (default: 0, 60 or 200 by effort)",
    )  # fmt: skip
    quantize.add_argument(
        "--ram", type=size_of, metavar="SIZE", help="maximum memory that this job itself may use, e.g. 8GB"
    )  # fmt: skip
    quantize.add_argument("--table", help="existing table, instead of profiling")
    quantize.add_argument("--recipe", help="file of options, such as recipe.yaml of an earlier output folder")
    quantize.add_argument("--force", action="store_true", help="overwrite a result of other settings")
    quantize.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    quantize.add_argument("-o", "--output", type=output_name, required=True, help="folder to write")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.acceptance import check_effort
    from mpq.core.latency import load_latencies
    from mpq.core.table import SensitivityTable
    from mpq.exporters.holding import check_packages
    from mpq.exporters.targets import TARGETS

    recipe.fill(options)
    steps = recipe.recipe_of(options)
    recipe.check_output(options.output, steps, options.force)
    check_effort(options.effort)
    settings, pin, kv_formats = profiling_of(options), pins_of(options), kv_formats_of(options)
    budgets = budgets_of(options)
    latencies = load_latencies(options.latency) if options.latency else None
    table = SensitivityTable.load(options.table) if options.table else None
    target = TARGETS.named(options.target)
    check_packages(target)

    from mpq.feasible import Wanted, check_structure

    wanted = Wanted(
        options.bits, options.size, options.max_kl, options.memory, options.context, options.batch, options.kv_bits,
        kv_formats, settings["formats"], settings["metric"], settings["include"], settings["exclude"], pin,
        not options.no_ties, table,
    )  # fmt: skip
    check_structure(options.model, target, wanted)

    from mpq.pipeline import quantize_model
    from mpq.report import HEADINGS

    source = source_of(options)
    recipe.begin(options.output, steps)
    outcome = quantize_model(
        source, options.output, bits=options.bits, size=options.size, max_kl=options.max_kl, table=table, pin=pin,
        ties=not options.no_ties, target=options.target, effort=options.effort,
        tuning_steps=options.tuning_steps, ram=options.ram, memory=options.memory, context=options.context,
        batch=options.batch, kv_bits=options.kv_bits, kv_formats=kv_formats, budgets=budgets, latencies=latencies,
        metric_options=settings.pop("options"), **settings,
    )  # fmt: skip
    recipe.finish(options.output)
    if options.json:
        measured = [row.to_json() for row in outcome.measured]
        live = outcome.activations
        peak = {} if live is None else {"activations": live.peak(outcome.allocation.scheme_of)}
        say_json(
            {
                **allocation_facts(outcome.frontier, outcome.allocation),
                **peak,
                "folder": str(outcome.folder),
                "measured": measured,
            }
        )
    elif not options.quiet:
        print_table([HEADINGS, *(row[:-1] for row in outcome.rows())])
    say(options, f"\n{summary(outcome.frontier, outcome.allocation)}")
    say(options, coverage_line(outcome.table))
    for sentence in outcome.words():
        say(options, sentence)
    if outcome.tokens() and not (options.quiet or options.json):
        print_table(outcome.tokens())
    say(options, f"written to {outcome.folder}: packed weights, README.md, report.html, table, frontier, recipe.yaml")
