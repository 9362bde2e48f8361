"""The command line: `mpq COMMAND`. Heavy modules are imported by the command that needs them."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.cli.options import (
    budget_options,
    choice_options,
    data_options,
    model_options,
    pairs_of,
    print_table,
    profile_options,
    profiling_of,
    search_options,
    source_of,
)
from mpq.cli.studies import add_studies, adding_to
from mpq.core.errors import MpqError

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.frontier import Frontier
    from mpq.core.table import SensitivityTable

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for what was asked wrongly, 130 when interrupted."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING - 10 * options.verbose, format="mpq: %(message)s")
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1" and options.run is not _profile:
            raise MpqError("of all commands torchrun starts 'mpq profile' alone: give its table to quantize --table")
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

    command = adding_to(commands)
    quantize = command("quantize", _quantize, "profile, search, export and measure a model")
    model_options(quantize)
    profile_options(quantize)
    budget_options(quantize)
    choice_options(quantize)
    quantize.add_argument("--for", dest="consumer", default="mpq", help="who will run it: vllm, llama.cpp, ... or mpq")
    quantize.add_argument("--table", help="a table made before, instead of profiling")
    quantize.add_argument("-o", "--output", required=True, help="folder to write")

    profile = command("profile", _profile, "measure how much each layer suffers in each format")
    model_options(profile)
    profile_options(profile)
    profile.add_argument(
        "--offload", action="store_true", help="keep the weights in main memory, one module at a time on --device"
    )
    profile.add_argument("-o", "--output", required=True, help="table to write, a .csv file")

    allocate = command("allocate", _allocate, "choose formats under a budget, from a table")
    allocate.add_argument("table", help="what 'mpq profile' wrote")
    budget_options(allocate, loss=True)
    choice_options(allocate)
    search_options(allocate)
    allocate.add_argument("-o", "--output", help="allocation to write, a .json file")
    allocate.add_argument("--frontier", help="also write the frontier, a .csv file")

    plot = command("plot", _plot, "draw the frontiers of tables, output folders or frontier files, measured ones too")
    plot.add_argument("runs", nargs="+", help="tables, what --frontier wrote, or folders that 'mpq quantize' wrote")
    plot.add_argument(
        "-o", "--output", default="frontier.png", help="picture: .png, .svg or .pdf (default: frontier.png)"
    )

    export = command("export", _export, "write the packed weights of an allocation")
    model_options(export)
    export.add_argument("allocation", help="what 'mpq allocate' wrote")
    export.add_argument("--method", default="mse", help="rounding: nearest, mse (default) or gptq")
    export.add_argument("--to", default="mpq", help="mpq (default), compressed-tensors, gguf, ...")
    export.add_argument("-o", "--output", required=True, help="folder to write")

    evaluate = command("eval", _eval, "load a packed model and measure it")
    evaluate.add_argument("folder", help="what 'mpq quantize' or 'mpq export' wrote")
    data_options(evaluate)
    evaluate.add_argument("--trust", action="store_true", help="import the model's own factory")

    formats = command("formats", _formats, "list number formats, or tell all of one")
    formats.add_argument("names", nargs="*", help="formats to tell the whole grid of")
    add_studies(command)
    return top


def _quantize(options: argparse.Namespace) -> None:
    from mpq.core.table import SensitivityTable
    from mpq.pipeline import quantize_model

    settings, pin = profiling_of(options), pairs_of(options.pin, "pin")
    table = SensitivityTable.load(options.table) if options.table else None
    outcome = quantize_model(
        source_of(options), options.output, bits=options.bits, size=options.size, table=table, pin=pin,
        ties=not options.no_ties, trust=options.trust, consumer=options.consumer, **settings,
    )  # fmt: skip
    from mpq.report import HEADINGS

    print_table([HEADINGS, *(row[:-1] for row in outcome.rows())])
    print(f"\n{_summary(outcome.frontier, outcome.allocation)}")
    print(f"written to {outcome.folder}: packed weights, table, frontier, report.html")


def _profile(options: argparse.Namespace) -> None:
    from mpq.core.formats import DEFAULT_FORMATS
    from mpq.network.parallel import own_device, place, processes
    from mpq.sensitivity.profile import profile

    settings = profiling_of(options)
    settings["formats"] = settings["formats"] or DEFAULT_FORMATS
    source = source_of(options, stay=options.offload)
    with processes(options.device):
        table = profile(
            source.model, source.calibration, source.loss_fn, resume=f"{options.output}.unfinished",
            provenance={"model": source.name, "dataset": source.data},
            offload=own_device(options.device) if options.offload else None, **settings,
        )  # fmt: skip
        if place()[0] > 0:
            return
    table.save(options.output)
    print(f"{options.output}: {len(table.layers)} layers x {len(table.schemes)} formats, metric {table.metric}")


def _allocate(options: argparse.Namespace) -> None:
    import numpy as np

    from mpq.core.latency import load_latencies
    from mpq.core.scheme import parse_scheme
    from mpq.core.table import SensitivityTable
    from mpq.search import frontier_of

    table = SensitivityTable.load(options.table)
    budgets = {name: float(value) for name, value in pairs_of(options.budget, "budget").items()}
    costs = {}
    if options.latency:
        seconds = load_latencies(options.latency).cost(options.batch)
        schemes = [parse_scheme(name) for name in table.schemes]
        costs["latency"] = np.array([[seconds(layer, scheme) for scheme in schemes] for layer in table.layers])
    asked: dict[str, Any] = {"pin": pairs_of(options.pin, "pin"), "ties": not options.no_ties, "costs": costs}
    search = options.by or ("cheapest" if options.loss is not None else "integer" if budgets else "exact")
    if search == "cheapest" and options.loss is None:
        raise MpqError("--by cheapest finds the smallest of a quality: give --loss instead of --bits or --size")
    if search != "cheapest" and options.loss is not None:
        raise MpqError(f"--loss is a predicted loss, which --by {search} does not search for: leave --by out")
    if options.measure_frontier and (search != "evolution" or budgets):
        raise MpqError("--measure-frontier wants --by evolution, and no --budget or --loss")
    if search == "exact":
        frontier = frontier_of(table, budgets=budgets, **asked)
        allocation = frontier.at(bits=options.bits, size=options.size)
    elif search == "cheapest":
        frontier = frontier_of(table, search=search, budgets=budgets, loss=options.loss, **asked)
        allocation = frontier.allocation(0)
    else:
        weights = sum(layer.params for layer in table.layers)
        overhead = table.provenance.get("overhead", 0)
        if not options.measure_frontier:
            budgets["size"] = options.bits * weights / 8 if options.size is None else options.size - overhead
        extra = _evolving(options, table) if search == "evolution" else {}
        frontier = frontier_of(table, search=search, budgets=budgets, **asked, **extra)
        allocation = (
            frontier.at(bits=options.bits, size=options.size)
            if options.measure_frontier
            else frontier.allocation(len(frontier) - 1)
        )
    if options.frontier:
        frontier.save(options.frontier)
    if options.output:
        allocation.save(options.output)
        print(_summary(frontier, allocation))
    else:
        _print_allocation(allocation, table)
        print(f"\n{_summary(frontier, allocation)}")


def _evolving(options: argparse.Namespace, table: "SensitivityTable") -> dict[str, Any]:
    """What evolution needs besides the problem: the model, to measure allocations on."""
    from mpq.pipeline import measuring
    from mpq.sources import open_source

    name = options.model or table.provenance.get("model")
    if name is None:
        raise MpqError("evolution measures allocations on the model, which the table does not name: give --model")
    source = open_source(name, options.dataset or table.provenance.get("dataset"))
    evaluate = measuring(source, table.provenance.get("method", "mse"))
    return {
        "evaluate": evaluate, "trials": options.trials, "storage": options.storage, "study": options.study,
        "seed": options.seed, "sampler": options.sampler, "resume": options.resume,
    }  # fmt: skip


def _plot(options: argparse.Namespace) -> None:
    from mpq.core.allocation import Allocation
    from mpq.core.files import write_atomically
    from mpq.core.frontier import Frontier, SavedFrontier, is_frontier
    from mpq.core.table import SensitivityTable
    from mpq.plots import draw_frontier, frontier_facts
    from mpq.search import frontier_of

    suffix = Path(options.output).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise MpqError(f"the picture {options.output} ends in {suffix or 'nothing'!r}: expected .png, .svg or .pdf")
    frontiers: dict[str, Frontier | SavedFrontier] = {}
    chosen: dict[str, Allocation] = {}
    for run in options.runs:
        path = Path(run)
        name = str(path) if len(options.runs) > 1 else "searched frontier"
        saved = path / "frontier.csv" if path.is_dir() else path
        found = SavedFrontier.load(saved) if is_frontier(saved) else None
        if found is None or (path.is_dir() and found.measured is None):  # the table knows the uniform formats too
            frontiers[name] = frontier_of(SensitivityTable.load(path / "table.csv" if path.is_dir() else path))
        else:
            frontiers[name] = found
        if (path / "allocation.json").is_file():
            chosen[f"chosen, {path}" if len(options.runs) > 1 else "chosen"] = Allocation.load(path / "allocation.json")
    with write_atomically(options.output) as draft:
        draw_frontier(frontier_facts(frontiers, chosen)).savefig(draft, dpi=150)
    print(options.output)


def _export(options: argparse.Namespace) -> None:
    from mpq.core.allocation import Allocation
    from mpq.exporters import exporter_named
    from mpq.pipeline import export_to, megabytes

    allocation = Allocation.load(options.allocation)
    exporter_named(options.to)  # before the model is read
    written = export_to(options.to, source_of(options), allocation, options.output, options.method)
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
    rows: list[Sequence[str]] = [("format", "bits", "codes", "scale", "minimum", "shared by", "range of codes")]
    for name, format in FORMATS.items():
        shared = {"group": f"{format.group_size}", "channel": "a channel", "tensor": "the tensor", "none": "-"}
        outer = " x fp32" if format.tensor_scale else " x fp16" if format.super_group else ""
        scale = "-" if format.is_float_copy else format.scale + outer
        minimum = format.minimum + (outer if format.minimum else "") or "-"
        low, high = format.grid.min, format.grid.max
        bits = f"{format.effective_bits():.3f}"
        rows.append((name, bits, format.grid.name, scale, minimum, shared[format.granularity], f"{low:g} to {high:g}"))
    print_table(rows)
    grammar = "GRID[-tensor|-channel|-gN][-asym][-sSCALE][-mMINIMUM][-bN][-ts]"
    print(f"\n{grammar}; bits are those of a 4096 x 4096 matrix, scales counted")


def _summary(frontier: "Frontier", allocation: "Allocation") -> str:
    proof = "proven optimal" if frontier.gap == 0 else f"within {100 * frontier.gap:.2g} % of the optimum"
    if "measured_loss" in allocation.provenance:
        proof = f"measured loss increase {allocation.provenance['measured_loss']:.4g}"
    return (
        f"{allocation.bits:.4f} bits per weight, {allocation.total:,} bytes in all, predicted loss increase "
        f"{allocation.loss:.4g} +- {allocation.error:.1g} ({allocation.metric}), {proof}"
    )


def _print_allocation(allocation: "Allocation", table: "SensitivityTable") -> None:
    rows: list[Sequence[str]] = [("layer", "weights", "format", "predicted loss +", "tie")]
    for i, (layer, scheme) in enumerate(zip(allocation.layers, allocation.schemes, strict=True)):
        score = table.scores[i, table.schemes.index(scheme)]
        rows.append((layer.name, f"{layer.rows} x {layer.cols}", scheme, f"{score:.3g}", layer.tie))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
