"""Commands that study: which metric to trust on a model, and better proxies for a family of models."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mpq.core.errors import MpqError
from mpq.options import model_options, pairs_of, profile_options, profiling_of, source_of

AddCommand = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_studies(command: AddCommand) -> None:
    """Add the commands, each made by `command(name, function, text)`."""
    judge = command("judge", _judge, "measure how well each metric predicts the true loss of a model")
    model_options(judge)
    profile_options(judge)
    judge.add_argument("--metrics", default="fisher,output,hessian", help="metrics to judge, separated by commas")
    judge.add_argument("--budgets", default="2.5,3,4", help="average bits, separated by commas")
    judge.add_argument("--count", type=int, default=40, help="random allocations at each budget (default: 40)")
    judge.add_argument("-o", "--output", default="judge.png", help="picture to write (default: judge.png)")

    bench = command("proxy-bench", _proxy_bench, "measure random configurations of a model: the truth for proxies")
    model_options(bench)
    bench.add_argument("-n", "--rows", type=int, default=425, help="configurations (default: 425)")
    bench.add_argument("--pin", action="append", default=[], metavar="LAYERS=FORMAT", help="fix layers to a format")
    bench.add_argument("-o", "--output", required=True, help="benchmark to write, a .csv file")

    evolve = command("proxy-evolve", _proxy_evolve, "evolve a training-free score on one half of a benchmark")
    model_options(evolve)
    evolve.add_argument("benchmark", help="what 'mpq proxy-bench' wrote")
    evolve.add_argument("--population", type=int, default=50)
    evolve.add_argument("--generations", type=int, default=1000)
    evolve.add_argument("-o", "--output", required=True, help="folder to write; a stopped run in it is resumed")

    show = command("proxy-show", _proxy_show, "how proxies rank a benchmark's configurations")
    model_options(show)
    show.add_argument("benchmark", help="what 'mpq proxy-bench' wrote")
    show.add_argument("proxies", nargs="*", help="names or formulas (default: all known ones)")


def _judge(options: argparse.Namespace) -> None:
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


def _proxy_bench(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_bench

    source = source_of(options)
    found = run_bench(
        source.model, source.evaluation, source.loss_fn, options.output, rows=options.rows,
        pin=pairs_of(options.pin, "pin"), seed=options.seed,
        provenance={"model": source.name, "dataset": source.data},
    )  # fmt: skip
    print(f"{options.output}: {len(found.quality)} configurations measured")


def _proxy_evolve(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_evolve, table_of

    source = source_of(options)
    _, standings = run_evolve(
        source.model, source.calibration, source.loss_fn, options.benchmark, options.output,
        population=options.population, generations=options.generations, seed=options.seed,
    )  # fmt: skip
    print(table_of(standings))
    print(f"\nbest formula: {(Path(options.output) / 'best.txt').read_text().strip()}")


def _proxy_show(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_show, table_of

    source = source_of(options)
    standings = run_show(
        source.model, source.calibration, source.loss_fn, options.benchmark, options.proxies, seed=options.seed
    )
    print(table_of(standings))
