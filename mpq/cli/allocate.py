"""`mpq allocate`: formats under a budget, from a table."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpq.cli.options import (
    AddCommand,
    budget_options,
    choice_options,
    memory_options,
    number_of,
    output_name,
    pairs_of,
    pins_of,
    print_table,
    search_options,
    target_option,
)
from mpq.cli.say import allocation_facts, say, say_json, summary
from mpq.core.errors import MpqError
from mpq.core.live_activations import ACTIVATIONS
from mpq.core.scheme import Scheme
from mpq.search import SEARCHES

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.live_activations import LiveActivations
    from mpq.core.table import SensitivityTable
    from mpq.sources import Source


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    allocate = command("allocate", run, "choose formats under a budget, from a table")
    allocate.add_argument("table", help="table that 'mpq profile' wrote")
    budget_options(allocate, loss=True, required=False)
    memory_options(allocate)
    choice_options(allocate)
    search_options(allocate)
    target_option(allocate)
    allocate.add_argument(
        "--emit", metavar="TOOL[=FILE]",
        help="write a configuration for another quantizer, in formats that it supports: modelopt, llm-compressor, "
        "autoround, gptqmodel, llama-quantize or mlx; printed without a file name",
    )  # fmt: skip
    allocate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    allocate.add_argument("-o", "--output", type=output_name, help="allocation to write, a .json file")
    allocate.add_argument("--frontier", help="also write the frontier, a .csv file")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from dataclasses import replace

    from mpq.core.files import write_atomically
    from mpq.core.interactions import Interactions
    from mpq.core.latency import load_latencies
    from mpq.core.table import SensitivityTable
    from mpq.exporters.configurations import tool_named, write_configuration
    from mpq.exporters.holding import Holder, restrict
    from mpq.exporters.targets import TARGETS
    from mpq.search.choice import allocate, check_choice

    by_loss, budgets = options.loss is not None, pairs_of(options.budget, "budget")
    search = options.by or ("cheapest" if by_loss else "integer" if budgets else "exact")
    check_choice(search, by_loss, bool(budgets), options.measure_frontier)
    pins = pins_of(options)
    table = SensitivityTable.load(options.table)
    tool, _, file = (options.emit or "").partition("=")
    holders: list[Holder] = [TARGETS.named(options.target)] if options.target else []
    holders += [tool_named(tool)] if tool else []
    held = restrict(table, *holders)
    held.check_budget(bits=options.bits, size=options.size, pin=pins, ties=not options.no_ties)
    table = held.table
    choice = allocate(
        table, forbid=held.forbid, bits=options.bits, size=options.size, loss=options.loss, search=search, pin=pins,
        memory=options.memory, context=options.context or 0, kv_bits=options.kv_bits,
        ties=not options.no_ties or held.fuses, batch=options.batch, whole_frontier=options.measure_frontier,
        budgets={name: number_of(name, value) for name, value in budgets.items()},
        latencies=load_latencies(options.latency) if options.latency else None,
        activations=_live(options, table) if ACTIVATIONS in budgets else None,
        **({"interactions": Interactions.load(options.interactions)} if options.interactions else {}),
        **(_evolving(options, table) if SEARCHES.named(search).measures else {}),
    )  # fmt: skip
    if options.frontier:
        choice.frontier.save(options.frontier)
    if options.output:
        provenance = {**choice.allocation.provenance, "table": options.table}
        replace(choice.allocation, provenance=provenance).save(options.output)
    configuration = write_configuration(tool, choice.allocation) if tool else ""
    if file:
        with write_atomically(file) as draft:
            draft.write_text(configuration, encoding="utf-8")
    elif tool:
        print(configuration, end="")
        lines = [] if options.quiet else [held.sentence, summary(choice.frontier, choice.allocation)]
        print("\n".join(filter(None, lines)), file=sys.stderr)
        return
    if options.json:
        say_json(allocation_facts(choice.frontier, choice.allocation))
    elif not (options.output or file or options.quiet):
        _print_allocation(choice.allocation, table)
        print()
    if held.sentence:
        say(options, held.sentence)
    say(options, summary(choice.frontier, choice.allocation))


def _source(options: argparse.Namespace, table: "SensitivityTable") -> "Source":
    """The table's model, or another that is named, with its data."""
    from mpq.sources import names_in, open_source

    own, data, untrusted = names_in(table.provenance, options.trust)
    name = options.model or own
    if name is None:
        raise MpqError("this needs the model, which the table does not name: give --model")
    return open_source(name, options.dataset or data, untrusted=untrusted - {options.model, options.dataset})


def _live(options: argparse.Namespace, table: "SensitivityTable") -> "LiveActivations | None":
    """What is live in a pass of the table's model."""
    from mpq.memory import live_in

    layers = table.weights().layers
    return live_in(_source(options, table), layers, options.batch, options.context, math.inf, table.schemes)


def _evolving(options: argparse.Namespace, table: "SensitivityTable") -> dict[str, Any]:
    """Options of evolution besides the problem: the model on which it measures allocations."""
    from mpq.measuring import measuring

    source = _source(options, table)
    evaluate = measuring(source, table.provenance.get("method", "mse"))
    return {
        "evaluate": evaluate, "trials": options.trials, "storage": options.storage, "study": options.study,
        "seed": options.seed, "sampler": options.sampler, "resume": options.resume,
    }  # fmt: skip


def _print_allocation(allocation: "Allocation", table: "SensitivityTable") -> None:
    from mpq.core.prediction import predicts_loss

    score_name = "predicted loss +" if predicts_loss(table.metric) else "score"
    rows: list[Sequence[str]] = [("layer", "weights", "format", score_name, "tie")]
    places = {layer.name: i for i, layer in enumerate(table.layers)}
    pairs = [*zip(allocation.layers, allocation.schemes, strict=True)]
    if allocation.cache is not None:
        cached = (Scheme(format, cached=True).name for format in allocation.cache.format_of.values())
        pairs += zip(allocation.cache.entries, cached, strict=True)
    for layer, scheme in pairs:
        score = table.scores[places[layer.name], table.schemes.index(scheme)]
        rows.append((layer.name, f"{layer.rows} x {layer.cols}", scheme, f"{score:.3g}", layer.tie))
    print_table(rows)
