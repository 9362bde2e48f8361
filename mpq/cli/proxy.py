"""`mpq proxy`: build benchmarks of training-free scores, evolve and judge scores."""

import argparse

from mpq.cli.options import AddCommand, adding_to, model_options, output_name, pairs_of, source_of


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    family = command("proxy", run, "training-free scores: build a benchmark, evolve, judge")
    proxy = adding_to(family.add_subparsers(metavar="WHAT", required=True, help="one of:"))
    bench = proxy("bench", _proxy_bench, "measure random configurations of a model, as the benchmark of proxies")
    model_options(bench)
    bench.add_argument("-n", "--rows", type=int, default=425, help="configurations (default: 425)")
    bench.add_argument("--pin", action="append", default=[], metavar="LAYERS=FORMAT", help="fix layers to a format")
    bench.add_argument("-o", "--output", type=output_name, required=True, help="benchmark to write, a .csv file")

    evolve = proxy("evolve", _proxy_evolve, "evolve a training-free score on one half of a benchmark")
    model_options(evolve)
    evolve.add_argument("benchmark", help="benchmark that 'mpq proxy bench' wrote")
    evolve.add_argument("--population", type=int, default=50, help="population size")
    evolve.add_argument("--generations", type=int, default=1000, help="generations")
    evolve.add_argument(
        "-o", "--output", type=output_name, required=True, help="folder to write; a stopped run in it is resumed"
    )

    show = proxy("show", _proxy_show, "how proxies rank a benchmark's configurations")
    model_options(show)
    show.add_argument("benchmark", help="benchmark that 'mpq proxy bench' wrote")
    show.add_argument("proxies", nargs="*", help="names or formulas (default: all known ones)")


def run(options: argparse.Namespace) -> None:
    """The parser has asked for a command of the family already."""


def _proxy_bench(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_bench

    source = source_of(options)
    benchmark = run_bench(
        source.model, source.evaluation, source.loss_fn, options.output, rows=options.rows,
        pin=pairs_of(options.pin, "pin"), seed=options.seed,
        provenance=source.provenance(),
    )  # fmt: skip
    print(f"{options.output}: {len(benchmark.quality)} configurations measured")


def _proxy_evolve(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_evolve, table_of

    source = source_of(options)
    evolution, standings = run_evolve(
        source.model, source.calibration, source.loss_fn, options.benchmark, options.output,
        population=options.population, generations=options.generations, seed=options.seed,
    )  # fmt: skip
    print(table_of(standings))
    print(f"\nbest formula: {evolution.best.formula}\n(as a metric: --metric 'proxy:{evolution.best.formula}')")


def _proxy_show(options: argparse.Namespace) -> None:
    from mpq.proxies.runs import run_show, table_of

    source = source_of(options)
    standings = run_show(
        source.model, source.calibration, source.loss_fn, options.benchmark, options.proxies, seed=options.seed
    )
    print(table_of(standings))
