"""The command line: `mpq COMMAND`. Heavy modules are imported by the command that needs them."""

import argparse
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.core.errors import MpqError

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.frontier import Frontier
    from mpq.core.table import SensitivityTable
    from mpq.sources import Source

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for what was asked wrongly, 130 when interrupted."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING - 10 * options.verbose, format="mpq: %(message)s")
    try:
        options.run(options)
    except MpqError as error:
        print(f"mpq: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("mpq: interrupted; the same command goes on from what is done", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    top = argparse.ArgumentParser(
        prog="mpq", description="Find each layer's number format, see the whole frontier, write packed weights."
    )
    top.add_argument("-v", "--verbose", action="count", default=0, help="say more")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(run=run)
        return found

    quantize = command("quantize", _quantize, "profile, search, export and measure a model")
    _model_options(quantize)
    _profile_options(quantize)
    _budget_options(quantize)
    _choice_options(quantize)
    quantize.add_argument("--for", dest="consumer", default="mpq", help="who will run it: vllm, llama.cpp, ... or mpq")
    quantize.add_argument("--table", help="a table made before, instead of profiling")
    quantize.add_argument("-o", "--output", required=True, help="folder to write")

    profile = command("profile", _profile, "measure how much each layer suffers in each format")
    _model_options(profile)
    _profile_options(profile)
    profile.add_argument("-o", "--output", required=True, help="table to write, a .csv file")

    allocate = command("allocate", _allocate, "choose formats under a budget, from a table")
    allocate.add_argument("table", help="what 'mpq profile' wrote")
    _budget_options(allocate)
    _choice_options(allocate)
    allocate.add_argument(
        "--budget", action="append", default=[], metavar="COST=NUMBER", help="another budget, as bitops=2e9"
    )
    allocate.add_argument("--by", default=None, help="search: exact (default), integer (several budgets), ...")
    allocate.add_argument("-o", "--output", help="allocation to write, a .json file")
    allocate.add_argument("--frontier", help="also write the frontier, a .csv file")

    plot = command("plot", _plot, "draw the frontiers of one or more tables or output folders")
    plot.add_argument("runs", nargs="+", help="tables, or folders that 'mpq quantize' wrote")
    plot.add_argument(
        "-o", "--output", default="frontier.png", help="picture: .png, .svg or .pdf (default: frontier.png)"
    )

    export = command("export", _export, "write the packed weights of an allocation")
    _model_options(export)
    export.add_argument("allocation", help="what 'mpq allocate' wrote")
    export.add_argument("--method", default="mse", help="rounding: nearest, mse (default) or gptq")
    export.add_argument("--to", default="mpq", help="mpq (default), compressed-tensors, gguf, ...")
    export.add_argument("-o", "--output", required=True, help="folder to write")

    evaluate = command("eval", _eval, "load a packed model and measure it")
    evaluate.add_argument("folder", help="what 'mpq quantize' or 'mpq export' wrote")
    _data_options(evaluate)
    evaluate.add_argument("--trust", action="store_true", help="import the model's own factory")

    formats = command("formats", _formats, "list number formats, or tell all of one")
    formats.add_argument("names", nargs="*", help="formats to tell the whole grid of")
    return top


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="tiny-lm, tiny-cnn, a Hugging Face folder or id, timm:NAME, package.module:factory"
    )
    _data_options(parser)
    parser.add_argument("--trust", action="store_true", help="let a checkpoint import the model's own factory")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="data: a file, datasets:ID, package.module:loader (default: the model's own)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default: 128)")
    parser.add_argument("--seqlen", type=int, help="tokens of a sample (default: 256, or the model's context)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


def _profile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", help="candidates, separated by commas (default: integers of 2 to 8 bits)")
    parser.add_argument("--metric", help="sensitivity metric (default: the one that predicts best)")
    parser.add_argument("--method", default="mse", help="rounding: nearest, mse (default) or gptq")
    parser.add_argument("--include", action="append", help="layer pattern: a glob, or re:REGEX (default: all)")
    parser.add_argument("--exclude", action="append", default=[], help="layer pattern to leave as it is")


def _budget_options(parser: argparse.ArgumentParser) -> None:
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=float, help="largest average bits per weight, scales counted")
    budget.add_argument("--size", type=_size, help="largest size of the model, as 500MB")


def _choice_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pin", action="append", default=[], metavar="LAYERS=FORMAT", help="fix layers to a format")
    parser.add_argument("--no-ties", action="store_true", help="let fused layers (q/k/v, gate/up) differ")


def _size(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 500MB, 1.5GB or a number of bytes")
    return float(match[1]) * UNITS[match[2]]


def _pairs(items: Sequence[str], what: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.rpartition("=")
        if not (name and equals and value):
            raise MpqError(f"{item!r} is no {what}: write NAME=VALUE")
        pairs[name] = value
    return pairs


def _source(options: argparse.Namespace) -> "Source":
    from mpq.sources import open_source

    return open_source(
        options.model, options.dataset, nsamples=options.nsamples, seqlen=options.seqlen,
        batch_size=options.batch_size, seed=options.seed, device=options.device,
    )  # fmt: skip


def _profiling(options: argparse.Namespace) -> dict[str, Any]:
    from mpq.core.scheme import parse_scheme
    from mpq.sensitivity import DEFAULT_METRIC

    formats = tuple(filter(None, options.formats.split(","))) if options.formats is not None else None
    for name in formats or ():
        parse_scheme(name)  # before the model is read
    return {
        "formats": formats, "metric": options.metric or DEFAULT_METRIC, "method": options.method,
        "include": options.include or ("*",), "exclude": options.exclude, "seed": options.seed,
    }  # fmt: skip


def _quantize(options: argparse.Namespace) -> None:
    from mpq.core.table import SensitivityTable
    from mpq.pipeline import quantize_model

    settings, pin = _profiling(options), _pairs(options.pin, "pin")
    table = SensitivityTable.load(options.table) if options.table else None
    outcome = quantize_model(
        _source(options), options.output, bits=options.bits, size=options.size, table=table, pin=pin,
        ties=not options.no_ties, trust=options.trust, consumer=options.consumer, **settings,
    )  # fmt: skip
    from mpq.report import HEADINGS

    _print_table([HEADINGS, *(row[:-1] for row in outcome.rows())])
    print(f"\n{_summary(outcome.frontier, outcome.allocation)}")
    print(f"written to {outcome.folder}: packed weights, table, frontier, report.html")


def _profile(options: argparse.Namespace) -> None:
    from mpq.core.formats import DEFAULT_FORMATS
    from mpq.sensitivity.profile import profile

    settings = _profiling(options)
    settings["formats"] = settings["formats"] or DEFAULT_FORMATS
    source = _source(options)
    table = profile(
        source.model, source.calibration, source.loss_fn, resume=f"{options.output}.unfinished",
        provenance={"model": source.name, "dataset": source.data}, **settings,
    )  # fmt: skip
    table.save(options.output)
    print(f"{options.output}: {len(table.layers)} layers x {len(table.schemes)} formats, metric {table.metric}")


def _allocate(options: argparse.Namespace) -> None:
    from mpq.core.table import SensitivityTable
    from mpq.search import frontier_of

    table = SensitivityTable.load(options.table)
    budgets = {name: float(value) for name, value in _pairs(options.budget, "budget").items()}
    pin, ties = _pairs(options.pin, "pin"), not options.no_ties
    search = options.by or ("integer" if budgets else "exact")
    if search == "exact":
        frontier = frontier_of(table, pin=pin, ties=ties, budgets=budgets)
        allocation = frontier.at(bits=options.bits, size=options.size)
    else:
        weights = sum(layer.params for layer in table.layers)
        overhead = table.provenance.get("overhead", 0)
        budgets["size"] = options.bits * weights / 8 if options.size is None else options.size - overhead
        frontier = frontier_of(table, search=search, pin=pin, ties=ties, budgets=budgets)
        allocation = frontier.allocation(len(frontier) - 1)
    if options.frontier:
        frontier.save(options.frontier)
    if options.output:
        allocation.save(options.output)
        print(_summary(frontier, allocation))
    else:
        _print_allocation(allocation, table)
        print(f"\n{_summary(frontier, allocation)}")


def _plot(options: argparse.Namespace) -> None:
    from mpq.core.allocation import Allocation
    from mpq.core.files import write_atomically
    from mpq.core.table import SensitivityTable
    from mpq.plots import draw_frontier, frontier_facts
    from mpq.search import frontier_of

    suffix = Path(options.output).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise MpqError(f"the picture {options.output} ends in {suffix or 'nothing'!r}: expected .png, .svg or .pdf")
    frontiers, chosen = {}, {}
    for run in options.runs:
        path = Path(run)
        table = SensitivityTable.load(path / "table.csv" if path.is_dir() else path)
        name = str(path) if len(options.runs) > 1 else "searched frontier"
        frontiers[name] = frontier_of(table)
        if (path / "allocation.json").is_file():
            chosen[f"chosen, {path}" if len(options.runs) > 1 else "chosen"] = Allocation.load(path / "allocation.json")
    with write_atomically(options.output) as draft:
        draw_frontier(frontier_facts(frontiers, chosen)).savefig(draft, dpi=150)
    print(options.output)


def _export(options: argparse.Namespace) -> None:
    from mpq.core.allocation import Allocation
    from mpq.exporters import exporter_named
    from mpq.pipeline import megabytes, moments_for

    allocation, export = Allocation.load(options.allocation), exporter_named(options.to)
    source = _source(options)
    moments = moments_for(options.method, source.model, allocation, source)
    written = export(
        source.model, allocation, options.output, method=options.method, second_moments=moments, recipe=source.recipe
    )
    files = [written] if written.is_file() else [path for path in written.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{written}: {megabytes(size)}, {allocation.bits:.3f} bits per weight")


def _eval(options: argparse.Namespace) -> None:
    from mpq.pipeline import evaluate_folder, megabytes

    quality, allocation = evaluate_folder(
        options.folder, options.dataset, trust=options.trust, nsamples=options.nsamples, seqlen=options.seqlen,
        batch_size=options.batch_size, seed=options.seed, device=options.device,
    )  # fmt: skip
    size = f"{megabytes(allocation.total)}, {allocation.bits:.3f} bits per weight"
    print(f"{options.folder}: {quality}, loss {quality.loss:.4f}; {size}")


def _formats(options: argparse.Namespace) -> None:
    from mpq.core.formats import FORMATS, parse_format

    for name in options.names:
        format = parse_format(name)
        print(f"{format.name}: {format.effective_bits():.4f} bits per weight of a 4096 x 4096 matrix")
        if format.grid.bits <= 8:
            numbers = sorted({value for value in format.grid.values().tolist() if math.isfinite(value)})
            print("  " + " ".join(f"{value:g}" for value in numbers))
    if options.names:
        return
    rows: list[Sequence[str]] = [("format", "bits", "codes", "scale", "shared by", "range of codes")]
    for name, format in FORMATS.items():
        shared = {"group": f"{format.group_size}", "channel": "a channel", "tensor": "the tensor", "none": "-"}
        scale = "-" if format.is_float_copy else format.scale + (" x fp32" if format.tensor_scale else "")
        low, high = format.grid.min, format.grid.max
        bits = f"{format.effective_bits():.3f}"
        rows.append((name, bits, format.grid.name, scale, shared[format.granularity], f"{low:g} to {high:g}"))
    _print_table(rows)
    print("\nGRID[-tensor|-channel|-gN][-asym][-sSCALE][-ts]; bits are those of a 4096 x 4096 matrix, scales counted")


def _summary(frontier: "Frontier", allocation: "Allocation") -> str:
    proof = "proven optimal" if frontier.gap == 0 else f"within {100 * frontier.gap:.2g} % of the optimum"
    return (
        f"{allocation.bits:.4f} bits per weight, {allocation.total:,} bytes in all, predicted loss increase "
        f"{allocation.loss:.4g} +- {allocation.error:.1g} ({allocation.metric}), {proof}"
    )


def _print_allocation(allocation: "Allocation", table: "SensitivityTable") -> None:
    rows: list[Sequence[str]] = [("layer", "weights", "format", "predicted loss +", "tie")]
    for i, (layer, scheme) in enumerate(zip(allocation.layers, allocation.schemes, strict=True)):
        score = table.scores[i, table.schemes.index(scheme)]
        rows.append((layer.name, f"{layer.rows} x {layer.cols}", scheme, f"{score:.3g}", layer.tie))
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
