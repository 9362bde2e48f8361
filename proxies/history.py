"""The history of an evolution: a CSV file, and a figure of best and median fitness."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Generation(NamedTuple):
    """The state after a generation; counts are of the whole run so far."""

    generation: int
    best: float  # fitness
    median: float  # median fitness of the population
    judged: int  # distinct valid genomes
    drawn: int  # genomes, rejected ones included
    formula: str  # the best one


History: TypeAlias = Sequence[Generation]


def save_history(path: str | os.PathLike[str], history: History) -> None:
    """Write a CSV file, a line per generation."""
    with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Generation._fields)
        writer.writerows((one.generation, repr(one.best), repr(one.median), *one[3:]) for one in history)


def load_history(path: str | os.PathLike[str]) -> tuple[Generation, ...]:
    """Read what `save_history` wrote.

    Raises:
        MpqError: no such file, or no history.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            return tuple(
                Generation(
                    int(line["generation"]), float(line["best"]), float(line["median"]), int(line["judged"]),
                    int(line["drawn"]), line["formula"],
                )
                for line in csv.DictReader(stream, strict=True)
            )  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise MpqError(f"{os.fspath(path)} is not a history of an evolution: {error}") from error


class Curves(NamedTuple):
    """Data of the figure."""

    judged: tuple[int, ...]
    best: tuple[float, ...]
    median: tuple[float, ...]
    steps: tuple[tuple[int, float, str], ...]  # (judged, fitness, formula) wherever the best formula changed


def curves(history: History) -> Curves:
    """The facts of the figure."""
    steps, last = [], ""
    for one in history:
        if one.formula != last:
            steps.append((one.judged, one.best, one.formula))
            last = one.formula
    return Curves(
        tuple(one.judged for one in history), tuple(one.best for one in history),
        tuple(one.median for one in history), tuple(steps),
    )  # fmt: skip


def plot_history(history: History, title: str = "") -> "Figure":
    """Best and median fitness against the proxies judged, the last formula named."""
    from matplotlib.figure import Figure

    shown = curves(history)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(shown.judged, shown.best, where="post", label="best")
    axes.plot(shown.judged, shown.median, label="median of the population", alpha=0.7)
    axes.plot([step[0] for step in shown.steps], [step[1] for step in shown.steps], "k.", markersize=4)
    axes.set_xlabel("distinct valid proxies judged")
    axes.set_ylabel("fitness (mean rank correlation)")
    axes.set_title(title or (shown.steps[-1][2] if shown.steps else ""), fontsize=8)
    axes.legend()
    return figure
