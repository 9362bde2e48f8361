"""`mpq judge`: metrics against measured loss."""

import argparse

from mpq.cli.options import AddCommand, model_options, profile_options, profiling_of, source_of
from mpq.core.errors import MpqError


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    judge = command("judge", run, "measure how well each metric predicts the true loss of a model")
    model_options(judge)
    profile_options(judge)
    judge.add_argument("--metrics", default="fisher,output,hessian", help="metrics to judge, separated by commas")
    judge.add_argument("--budgets", default="2.5,3,4", help="average bits, separated by commas")
    judge.add_argument("--count", type=int, default=40, help="random allocations at each budget (default: 40)")
    judge.add_argument("-o", "--output", default="judge.png", help="picture to write (default: judge.png)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.files import write_atomically
    from mpq.core.formats import DEFAULT_FORMATS
    from mpq.judge import judge, plot_judgement
    from mpq.sensitivity.profile import profile

    settings = profiling_of(options)
    del settings["metric"]
    settings["formats"] = settings["formats"] or DEFAULT_FORMATS
    try:
        budgets = [float(bits) for bits in options.budgets.split(",")]
    except ValueError as error:
        raise MpqError(f"{options.budgets!r} are no budgets: write average bits as 2.5,3,4") from error
    source = source_of(options)
    tables = {
        metric: profile(source.model, source.calibration, source.loss_fn, metric=metric, **settings)
        for metric in options.metrics.split(",")
    }
    judgement = judge(
        source.model, source.evaluation, source.loss_fn, tables, budgets=budgets, count=options.count,
        method=options.method, seed=options.seed,
    )  # fmt: skip
    print(judgement)
    with write_atomically(options.output) as draft:
        plot_judgement(judgement).savefig(draft, dpi=150)
    print(f"\n{options.output}")
