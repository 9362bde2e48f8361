"""Commands that study: metrics on a model, proxies for a family of models, kernels on a machine, a model's text."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpq.cli.options import model_options, pairs_of, print_table, profile_options, profiling_of, source_of
from mpq.core.errors import MpqError

if TYPE_CHECKING:
    import torch

Run = Callable[[argparse.Namespace], None]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_studies(command: AddCommand) -> None:
    """Add the commands, each made by `command(name, function, text)`."""
    judge = command("judge", _judge, "measure how well each metric predicts the true loss of a model")
    model_options(judge)
    profile_options(judge)
    judge.add_argument("--metrics", default="fisher,output,hessian", help="metrics to judge, separated by commas")
    judge.add_argument("--budgets", default="2.5,3,4", help="average bits, separated by commas")
    judge.add_argument("--count", type=int, default=40, help="random allocations at each budget (default: 40)")
    judge.add_argument("-o", "--output", default="judge.png", help="picture to write (default: judge.png)")

    family = command("proxy", _nothing, "training-free scores: measure a benchmark, evolve, judge")
    proxy = adding_to(family.add_subparsers(metavar="WHAT", required=True))
    bench = proxy("bench", _proxy_bench, "measure random configurations of a model: the truth for proxies")
    model_options(bench)
    bench.add_argument("-n", "--rows", type=int, default=425, help="configurations (default: 425)")
    bench.add_argument("--pin", action="append", default=[], metavar="LAYERS=FORMAT", help="fix layers to a format")
    bench.add_argument("-o", "--output", required=True, help="benchmark to write, a .csv file")

    evolve = proxy("evolve", _proxy_evolve, "evolve a training-free score on one half of a benchmark")
    model_options(evolve)
    evolve.add_argument("benchmark", help="what 'mpq proxy bench' wrote")
    evolve.add_argument("--population", type=int, default=50)
    evolve.add_argument("--generations", type=int, default=1000)
    evolve.add_argument("-o", "--output", required=True, help="folder to write; a stopped run in it is resumed")

    show = proxy("show", _proxy_show, "how proxies rank a benchmark's configurations")
    model_options(show)
    show.add_argument("benchmark", help="what 'mpq proxy bench' wrote")
    show.add_argument("proxies", nargs="*", help="names or formulas (default: all known ones)")

    bench = command("bench", _bench, "time packed layers on this machine, for searches with measured latency")
    bench.add_argument("--formats", default="int2-g128,int3-g128,int4-g128,int8-channel,mxfp4,nvfp4,nf4-g64")
    bench.add_argument("--shapes", default="4096x4096", help="rows x columns of layers (default: 4096x4096)")
    bench.add_argument("--batches", default="1,16", help="tokens at a time (default: 1,16)")
    bench.add_argument("--repeats", type=int, default=30)
    bench.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    bench.add_argument(
        "--inputs",
        choices=("float32", "bfloat16", "float16"),
        help="type of what comes in (default: float32; on a GPU bfloat16)",
    )
    bench.add_argument("--tune", action="store_true", help="on a GPU: choose blocks by timing first, and keep them")
    bench.add_argument("--list", action="store_true", help="say which kernels the device runs, and stop")
    bench.add_argument("-o", "--output", help="latency table to write, a .json file for 'mpq allocate --latency'")

    generate = command("generate", _generate, "continue a prompt with a packed language model")
    generate.add_argument("folder", help="what 'mpq quantize' wrote")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--compare", action="store_true", help="also time the original model in bfloat16")


def adding_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> AddCommand:
    """A function that adds a command with its text to these."""

    def command(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(run=run)
        return found

    return command


def _nothing(options: argparse.Namespace) -> None:
    """The parser has asked for a command of the family already."""


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


def _bench(options: argparse.Namespace) -> None:
    import torch

    from mpq.kernels.bench import describe, device_of, latency_table, measure

    device = device_of(options.device)
    print(describe(device))
    if options.list:
        return
    try:
        shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes.split(",")]
        batches = [int(batch) for batch in options.batches.split(",")]
        sizes = [(rows, cols) for rows, cols in shapes]
    except ValueError as error:
        raise MpqError(
            f"shapes are written 4096x4096,..., batches 1,16,...: not {options.shapes}, {options.batches}"
        ) from error
    schemes = options.formats.split(",")
    if options.tune:
        _tune(schemes, sizes, batches, device)
    of_roof = "of copy" if device.type == "cuda" else "of read"
    rows = [("format", "rows x cols", "batch", "us", "GB/s", of_roof, "x float32", "x bf16")]
    timings = []
    dtype = getattr(torch, options.inputs) if options.inputs else None
    for timing in measure(schemes, sizes, batches, repeats=options.repeats, dtype=dtype, device=device):
        timings.append(timing)
        speed = f"{timing.nbytes / timing.seconds / 1e9:.1f}"
        ratios = (f"{timing.float32 / timing.seconds:.2f}", f"{timing.bfloat16 / timing.seconds:.2f}")
        where = (timing.scheme, f"{timing.rows} x {timing.cols}", str(timing.batch), _microseconds(timing.seconds))
        rows.append((*where, speed, f"{100 * timing.roof:.0f} %", *ratios))
    print_table(rows)
    if options.output:
        latency_table(timings, device).save(options.output)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def _tune(schemes: list[str], sizes: list[tuple[int, int]], batches: list[int], device: "torch.device") -> None:
    if device.type != "cuda":
        raise MpqError("--tune chooses blocks of the GPU kernels: it needs --device cuda")
    try:
        from mpq.kernels.gpu.triton.tune import tune
    except ImportError:
        raise MpqError("--tune needs Triton: pip install triton") from None
    for scheme in schemes:
        for rows, cols in sizes:
            for batch in batches:
                tune(scheme, rows, cols, batch, device)


def _generate(options: argparse.Namespace) -> None:
    import torch

    from mpq.core.allocation import Allocation
    from mpq.exporters.mpq import checkpoint
    from mpq.generation.generate import compare_speeds, generate
    from mpq.quantized import fuse
    from mpq.sources import open_network

    model = fuse(checkpoint.load(options.folder))
    name = Allocation.load(Path(options.folder) / "allocation.json").provenance.get("model")
    if name is None:
        raise MpqError(f"{options.folder} does not say which model it was made of, so there is no tokenizer for it")
    network = open_network(name)
    if network.encode is None or network.tokenizer is None:
        raise MpqError(f"{name} has no tokenizer: only language models can continue a prompt")
    prompt = torch.tensor(network.encode(options.prompt))
    found = generate(
        model, prompt, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed
    )
    print(options.prompt + network.tokenizer.decode(list(found.tokens)))
    print(f"\n{found.tokens_per_second:.1f} tokens per second")
    if options.compare:
        speeds = compare_speeds({"packed": model, "bfloat16": network.model.to(torch.bfloat16)}, prompt)
        print(", ".join(f"{which} {speed:.1f}" for which, speed in speeds.items()))
