"""`mpq plot`: plot frontiers."""

import argparse
from pathlib import Path

from mpq.cli.options import AddCommand
from mpq.core.errors import MpqError


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    plot = command("plot", run, "plot the frontiers of tables, output folders or frontier files")
    plot.add_argument(
        "runs", nargs="+", help="tables, files that --frontier wrote, or folders that 'mpq quantize' wrote"
    )
    plot.add_argument(
        "-o", "--output", default="frontier.png", help="picture: .png, .svg or .pdf (default: frontier.png)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.core.allocation import Allocation
    from mpq.core.files import write_atomically
    from mpq.core.frontier import Frontier, SavedFrontier, is_frontier
    from mpq.core.table import SensitivityTable
    from mpq.exporters.folder import ALLOCATION, read_allocation
    from mpq.plots import draw_frontier, frontier_facts
    from mpq.search import frontier_of

    suffix = Path(options.output).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise MpqError(f"invalid picture name {options.output!r}: expected .png, .svg or .pdf")
    frontiers: dict[str, Frontier | SavedFrontier] = {}
    chosen: dict[str, Allocation] = {}
    for run in options.runs:
        path = Path(run)
        name = str(path) if len(options.runs) > 1 else "searched frontier"
        saved = path / "frontier.csv" if path.is_dir() else path
        measured = SavedFrontier.load(saved) if is_frontier(saved) else None
        if measured is None or (path.is_dir() and measured.measured is None):  # the table knows the uniform formats too
            frontiers[name] = frontier_of(SensitivityTable.load(path / "table.csv" if path.is_dir() else path))
        else:
            frontiers[name] = measured
        if (path / ALLOCATION).is_file():
            chosen[f"chosen, {path}" if len(options.runs) > 1 else "chosen"] = read_allocation(path)
    with write_atomically(options.output) as draft:
        draw_frontier(frontier_facts(frontiers, chosen)).savefig(draft, dpi=150)
    print(options.output)
