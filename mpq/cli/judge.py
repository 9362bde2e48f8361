"""`mpq judge`: rank metrics by agreement with measured loss."""

import argparse
from typing import Any

from mpq.cli.options import (
    AddCommand,
    model_options,
    output_name,
    print_table,
    profile_options,
    profiling_of,
    source_of,
)
from mpq.cli.say import say, say_json
from mpq.core.errors import MpqError
from mpq.sensitivity import METRICS


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    judge = command("judge", run, "measure how well each metric predicts the true loss of a model")
    model_options(judge)
    profile_options(judge, metric=False)
    judge.add_argument("--metrics", default="fisher,output,hessian", help="metrics to judge, comma-separated")
    judge.add_argument("--budgets", default="2.5,3,4", help="budgets in average bits, comma-separated")
    judge.add_argument("--count", type=int, default=40, help="random allocations at each budget (default: 40)")
    judge.add_argument(
        "--config", nargs="+", metavar="FILE",
        help="instead compare allocations of other tools with ours of the same size: configurations of "
        "modelopt, llm-compressor, autoround, gptqmodel, llama-quantize or mlx (TOOL=FILE if not recognized), "
        "config.json of a quantized checkpoint, .gguf files or allocation.json",
    )  # fmt: skip
    judge.add_argument("--table", help="for --config: an existing table, instead of profiling")
    judge.add_argument("--effort", default="fast", help="for --config: how much to measure in choosing ours")
    judge.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    judge.add_argument(
        "-o", "--output", type=output_name, default="judge.png", help="picture to write (default: judge.png)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.files import write_atomically
    from mpq.core.formats import DEFAULT_FORMATS
    from mpq.judge import judge, plot_judgement
    from mpq.sensitivity.profile import profile

    settings = profiling_of(options)
    if options.config:
        return _judge_files(options, settings)
    settings["formats"] = settings["formats"] or DEFAULT_FORMATS
    metrics = options.metrics.split(",")
    for name in metrics:
        METRICS.named(name)
    try:
        budgets = [float(bits) for bits in options.budgets.split(",")]
    except ValueError as error:
        raise MpqError(f"invalid budgets {options.budgets!r}: expected average bits, e.g. 2.5,3,4") from error
    source = source_of(options)
    tables = {
        metric: profile(source.model, source.calibration, source.loss_fn, metric=metric, **settings)
        for metric in metrics
    }
    judgement = judge(
        source.model, source.evaluation, source.loss_fn, tables, budgets=budgets, count=options.count,
        method=options.method, seed=options.seed,
    )  # fmt: skip
    if options.json:
        say_json({"budgets": judgement.budgets, "metrics": [verdict.to_json() for verdict in judgement.verdicts]})
    say(options, judgement)
    with write_atomically(options.output) as draft:
        plot_judgement(judgement).savefig(draft, dpi=150)
    say(options, f"\n{options.output}")


def _judge_files(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    from mpq.acceptance import check_effort
    from mpq.core.table import SensitivityTable
    from mpq.judge_files import judge_files
    from mpq.report import HEADINGS

    table = SensitivityTable.load(options.table) if options.table else None
    wanted = {name: settings[name] for name in ("formats", "method", "seed", "progress")}
    check_effort(options.effort)
    rows = judge_files(source_of(options), options.config, table=table, effort=options.effort, **wanted)
    if options.json:
        say_json({"measured": [row.to_json() for row in rows]})
    elif not options.quiet:
        print_table([HEADINGS, *(row.row()[:-1] for row in rows)])
