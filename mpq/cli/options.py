"""Options that several commands share, and their parsed values."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.core.cache import parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.live_activations import ACTIVATIONS
from mpq.core.scheme import parse_scheme
from mpq.core.sizes import parse_size
from mpq.exporters.targets import TARGETS
from mpq.rounding import DEFAULT_METHOD, METHODS
from mpq.sensitivity import DEFAULT_METRIC, GRANULARITIES, METRICS, check_granularity

if TYPE_CHECKING:
    from mpq.sources import Source

Run = Callable[[argparse.Namespace], None]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that adds the default of every option whose text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        no_default = default in (None, False, argparse.SUPPRESS) or default == [] or "(default" in text
        return text if no_default or not action.option_strings else f"{text} (default: %(default)s)"


def adding_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> AddCommand:
    """A function that adds a command with its description to these."""

    def command(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        parser.set_defaults(run=run, grammar=parser, json=False)
        quiet, hidden = "print nothing but errors (and --json)", argparse.SUPPRESS
        parser.add_argument("-q", "--quiet", action="store_true", default=hidden, help=quiet)
        return parser

    return command


def model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """A model and its data."""
    parser.add_argument(
        "model",
        nargs=None if required else "?",
        help="model: tiny-lm, tiny-cnn, a Hugging Face folder or id, timm:NAME, package.module:factory",
    )
    data_options(parser)


def data_options(parser: argparse.ArgumentParser) -> None:
    """Options of the data."""
    parser.add_argument("--dataset", help="data: a file, datasets:ID, package.module:loader (default: the model's own)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default: 128)")
    parser.add_argument(
        "--eval-samples", type=int, help="evaluation samples (default: --nsamples / 4 texts, or 4 x --nsamples images)"
    )
    parser.add_argument("--seqlen", type=int, help="tokens of a sample (default: 256, or the model's context)")
    parser.add_argument("--batch-size", type=int, help="samples per batch (default: 16, fewer for large vocabularies)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def profile_options(parser: argparse.ArgumentParser, *, metric: bool = True) -> None:
    """Options of a sensitivity table."""
    parser.add_argument("--formats", help="candidate formats, comma-separated (default: nl2-g32 to int8-channel)")
    if metric:
        parser.add_argument("--metric", help=f"sensitivity metric, see below (default: {DEFAULT_METRIC})")
        parser.epilog = f"metrics:\n{METRICS.help()}\n\nrounding methods:\n{METHODS.help()}"
        parser.add_argument(
            "--metric-option", action="append", default=[], metavar="KEY=VALUE",
            help="option of the metric, e.g. backend=pyhessian for hessian",
        )  # fmt: skip
        parser.add_argument(
            "--granularity", choices=GRANULARITIES,
            help="unit that takes one format: layer, or row for mixes within a layer (default: layer; for "
            "quantize, row for language models if the target supports it)",
        )  # fmt: skip
    parser.add_argument("--method", default=DEFAULT_METHOD, help=f"rounding method (default: {DEFAULT_METHOD})")
    parser.add_argument(
        "--include", action="append", help="pattern of layers to quantize: a glob, or re:REGEX (default: all)"
    )
    parser.add_argument("--exclude", action="append", default=[], help="pattern of layers to leave unquantized")


def budget_options(
    parser: argparse.ArgumentParser, *, loss: bool = False, divergence: bool = False, required: bool = True
) -> None:
    """One budget, or a bound on quality: a predicted loss or a measured divergence."""
    budget = parser.add_mutually_exclusive_group(required=required)
    budget.add_argument("--bits", type=float, help="maximum average bits per weight, scales included")
    budget.add_argument("--size", type=size_of, help="maximum size of the weights' file for the target, e.g. 500MB")
    if loss:
        budget.add_argument("--loss", type=float, help="maximum predicted loss increase: finds the smallest model")
    if divergence:
        budget.add_argument(
            "--max-kl", type=float, metavar="KL",
            help="maximum measured KL divergence from the original: finds the smallest model",
        )  # fmt: skip


def memory_options(parser: argparse.ArgumentParser) -> None:
    """Weights and cache in one budget."""
    parser.add_argument(
        "--memory", type=size_of, help="maximum memory of weights and key-value cache together, e.g. 6GB"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="cached tokens of each text, for --memory and --kv-bits"
    )
    parser.add_argument("--kv-bits", type=float, metavar="BITS", help="maximum average bits of cached keys and values")


def kv_formats_option(parser: argparse.ArgumentParser) -> None:
    """Formats of a cache."""
    parser.add_argument(
        "--kv-formats",
        metavar="FORMATS",
        help="candidate formats of keys and values, comma-separated, e.g. int4-g32-asym",
    )


def kv_formats_of(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The candidates of keys and values, None where none are named; MpqError for an unknown one."""
    names = tuple(filter(None, options.kv_formats.split(","))) if options.kv_formats is not None else None
    for name in names or ():
        parse_cache_format(name)
    return names


def target_option(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The option of the target."""
    help_text = "program that will run the model: vllm, llama.cpp, ...; limits schemes to those it supports"
    parser.add_argument("--for", "--target", dest="target", default=default, metavar="TARGET", help=help_text)
    parser.epilog = f"{parser.epilog or ''}\n\ntargets:\n{TARGETS.help()}".strip()


def further_budgets(parser: argparse.ArgumentParser) -> None:
    """Budgets of other costs than bytes."""
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="COST=NUMBER",
        help="further budget: bitops=2e9, latency=0.01, activations=500MB (live at once, for --batch and --context)",
    )
    parser.add_argument("--latency", help="table that 'mpq bench -o' wrote: adds the cost latency, in seconds")


def budgets_of(options: argparse.Namespace) -> dict[str, float]:
    """Further budgets by cost; MpqError for anything but numbers."""
    return {name: number_of(name, value) for name, value in pairs_of(options.budget, "budget").items()}


def number_of(name: str, text: str) -> float:
    """A budget's number, or its bytes; MpqError for anything else."""
    if name == ACTIVATIONS:
        return parse_size(text)
    try:
        return float(text)
    except ValueError:
        raise MpqError(f"invalid budget {name}={text}: expected a number, e.g. {name}=2e9") from None


def search_options(parser: argparse.ArgumentParser) -> None:
    """Options of a search."""
    further_budgets(parser)
    parser.add_argument(
        "--batch", type=int, default=1, help="batch size: tokens for --latency, texts for --memory (default: 1)"
    )
    parser.add_argument("--by", default=None, help="search method: exact (default), integer (several budgets), ...")
    parser.add_argument("--interactions", help="for --by pairwise: file of pairwise losses (Interactions.save)")
    parser.add_argument(
        "--model", help="for --by evolution, --budget activations=: model to measure (default: the table's)"
    )
    parser.add_argument(
        "--trust", action="store_true", help="allow the table to import the factory or loader that it names"
    )
    parser.add_argument("--dataset", help="for --by evolution: data of the model (default: the table's)")
    parser.add_argument(
        "--trials", type=int, default=100, help="for --by evolution: number of evaluations (default: 100)"
    )
    parser.add_argument("--storage", help="for --by evolution: journal file or database that workers share")
    parser.add_argument("--study", default="mpq", help="for --by evolution: name of the study in the storage")
    parser.add_argument(
        "--sampler", choices=("switch", "nsga2", "nsga3", "tpe", "random"),
        help="for --by evolution: switch (default: move single layers between formats), or a sampler of Optuna",
    )  # fmt: skip
    parser.add_argument(
        "--measure-frontier", action="store_true",
        help="for --by evolution: minimize loss and size together; gives a measured frontier (nsga2 by default)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="for --by evolution: resume a study in the storage; fail if there is none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")


def choice_options(parser: argparse.ArgumentParser) -> None:
    """Options that restrict a search's choice."""
    parser.add_argument("--pin", action="append", default=[], metavar="LAYERS=FORMAT", help="fix layers to a format")
    parser.add_argument("--no-ties", action="store_true", help="let fused layers (q/k/v, gate/up) differ")


def output_name(text: str) -> str:
    """The name of a file or folder to write, which a variable of the shell may have left empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no name: expected a file or folder to write")
    return text


def size_of(text: str) -> float:
    """Bytes of a size such as 500MB."""
    try:
        return parse_size(text)
    except MpqError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


EXPECTED = {"pin": "LAYERS=FORMAT", "budget": "COST=NUMBER", "metric option": "KEY=VALUE"}


def pairs_of(items: Sequence[str], what: str) -> dict[str, str]:
    """NAME=VALUE items as a dictionary; MpqError for any other."""
    pairs = {}
    for item in items:
        name, equals, value = item.rpartition("=")
        if not (name and equals and value):
            raise MpqError(f"invalid {what} {item!r}: expected {EXPECTED[what]}")
        pairs[name] = value
    return pairs


def source_of(options: argparse.Namespace, stay: bool = False) -> "Source":
    """The model and data that the options name; the model may stay in main memory, for `--offload`."""
    from mpq.network.parallel import own_device
    from mpq.sources import open_source

    return open_source(
        options.model, options.dataset, nsamples=options.nsamples, seqlen=options.seqlen,
        batch_size=options.batch_size, seed=options.seed, device=own_device(options.device),
        model_device="cpu" if stay else None, evaluation_samples=options.eval_samples,
    )  # fmt: skip


def profiling_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `profile`; errors in the options are raised here, before a model is read."""
    formats = tuple(filter(None, options.formats.split(","))) if options.formats is not None else None
    for name in formats or ():
        parse_scheme(name)
    METHODS.named(options.method)
    check_data(options.dataset)
    settings = {
        "formats": formats, "method": options.method, "include": options.include or ("*",), "exclude": options.exclude,
        "seed": options.seed, "progress": not options.quiet,
    }  # fmt: skip
    if "metric" not in options:
        return settings
    METRICS.named(options.metric or DEFAULT_METRIC)
    if options.granularity is not None:
        check_granularity(options.granularity, options.metric or DEFAULT_METRIC)
        settings["granularity"] = options.granularity
    pairs = pairs_of(options.metric_option, "metric option")
    return {
        **settings, "metric": options.metric or DEFAULT_METRIC,
        "options": {name: value_of(text) for name, text in pairs.items()},
    }  # fmt: skip


def pins_of(options: argparse.Namespace) -> dict[str, str]:
    """Pinned formats by layer pattern; MpqError for an unknown format."""
    pins = pairs_of(options.pin, "pin")
    for scheme in pins.values():
        parse_scheme(scheme)
    return pins


def check_data(name: str | None) -> None:
    """MpqError for a data file that is not there."""
    if name is not None and ":" not in name and Path(name).suffix and not Path(name).is_file():
        raise MpqError(f"no such file: {name}")


def value_of(text: str) -> Any:
    """A JSON value where the text is one, else the text: 3, 0.5, true, pyhessian."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
