"""`mpq allocate`: formats under a budget, from a table."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpq.cli.options import AddCommand, budget_options, choice_options, pairs_of, print_table, search_options
from mpq.cli.say import summary
from mpq.core.errors import MpqError

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.table import SensitivityTable


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    allocate = command("allocate", run, "choose formats under a budget, from a table")
    allocate.add_argument("table", help="what 'mpq profile' wrote")
    budget_options(allocate, loss=True)
    choice_options(allocate)
    search_options(allocate)
    allocate.add_argument("-o", "--output", help="allocation to write, a .json file")
    allocate.add_argument("--frontier", help="also write the frontier, a .csv file")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
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
        print(summary(frontier, allocation))
    else:
        _print_allocation(allocation, table)
        print(f"\n{summary(frontier, allocation)}")


def _evolving(options: argparse.Namespace, table: "SensitivityTable") -> dict[str, Any]:
    """What evolution needs besides the problem: the model, to measure allocations on."""
    from mpq.measuring import measuring
    from mpq.sources import names_in, open_source

    own, data, untrusted = names_in(table.provenance, options.trust)
    name = options.model or own
    if name is None:
        raise MpqError("evolution measures allocations on the model, which the table does not name: give --model")
    source = open_source(name, options.dataset or data, untrusted=untrusted - {options.model, options.dataset})
    evaluate = measuring(source, table.provenance.get("method", "mse"))
    return {
        "evaluate": evaluate, "trials": options.trials, "storage": options.storage, "study": options.study,
        "seed": options.seed, "sampler": options.sampler, "resume": options.resume,
    }  # fmt: skip


def _print_allocation(allocation: "Allocation", table: "SensitivityTable") -> None:
    rows: list[Sequence[str]] = [("layer", "weights", "format", "predicted loss +", "tie")]
    for i, (layer, scheme) in enumerate(zip(allocation.layers, allocation.schemes, strict=True)):
        score = table.scores[i, table.schemes.index(scheme)]
        rows.append((layer.name, f"{layer.rows} x {layer.cols}", scheme, f"{score:.3g}", layer.tie))
    print_table(rows)
