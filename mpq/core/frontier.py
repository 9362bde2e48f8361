"""Pareto frontiers of allocations: dominance, budget query, knee, hypervolume, CSV files."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.core.allocation import Allocation
from mpq.core.edits import CHECKSUM, check_edits, checksum
from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.problem import Array, Problem
from mpq.core.reading import reading
from mpq.core.sizes import parse_size

log = logging.getLogger(__name__)

BITS_PER_BYTE = 8
MEASURED_COLUMN = "measured"  # column of measured losses; `error` then holds their standard errors


@dataclass(frozen=True, eq=False, repr=False)
class Frontier:
    """Non-dominated solutions of a problem in one cost and the predicted loss, cheapest first.

    `choices[i]` is one scheme index per group; searches may compute it lazily. `gap` is a certificate: at no budget is
    there an allocation whose loss is below the frontier's by more than this share of it.

    Raises:
        MpqError: costs or losses out of order.
    """

    problem: Problem
    costs: Array  # (points,), strictly rising
    losses: Array  # (points,), strictly falling
    choices: Sequence[NDArray[np.integer[Any]]]  # (points, groups)
    cost: str = "size"  # name of the problem's cost
    gap: float = 0.0

    def __post_init__(self) -> None:
        if not (np.diff(self.costs) > 0).all() or not (np.diff(self.losses) < 0).all():
            raise MpqError(
                "invalid frontier: expected rising costs and falling losses; select points with `non_dominated` first"
            )

    def __len__(self) -> int:
        return len(self.costs)

    def __repr__(self) -> str:
        ends = f"{self.cost} {self.costs[0]:.6g} to {self.costs[-1]:.6g}" if len(self) else "empty"
        losses = f", loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if len(self) else ""
        return f"{type(self).__name__}({len(self)} points, {ends}{losses}, gap {self.gap:.2g})"

    def __iter__(self) -> Iterator[Allocation]:
        return (self.allocation(index) for index in range(len(self)))

    def allocation(self, index: int) -> Allocation:
        """The allocation of a point."""
        return self.problem.allocation(self.choices[index])

    def extra_columns(self, index: int) -> dict[str, float]:
        """Extra CSV columns of a point: predicted loss and its standard error."""
        loss, error = self.problem.prediction(self.choices[index])
        return {"loss": loss, "error": error}

    @property
    def bits(self) -> Array:
        """Average stored bits per weight at every point, (points,); only for frontiers in size."""
        return BITS_PER_BYTE * self._sizes() / self.problem.weights

    def at(
        self, *, bits: float | None = None, size: float | str | None = None, cost: float | None = None
    ) -> Allocation:
        """The allocation of least predicted loss within a budget.

        Args:
            bits: largest average of stored bits per weight, including scales and zero points.
            size: largest number of bytes of the whole model, including tensors that no scheme changes; or text as
                "500MB".
            cost: largest total of the frontier's cost.

        Raises:
            MpqError: no budget, several, or one out of reach (the message gives the reachable range).
        """
        return self.allocation(self.index_at(bits=bits, size=size, cost=cost))

    def index_at(self, *, bits: float | None = None, size: float | str | None = None, cost: float | None = None) -> int:
        """Index of the point that `at` returns."""
        if sum(budget is not None for budget in (bits, size, cost)) != 1:
            raise MpqError("expected exactly one budget: bits, size or cost")
        if bits is not None:
            self._sizes()
            return self._within("bits", bits, BITS_PER_BYTE / self.problem.weights, 0.0)
        if size is not None:
            self._sizes()
            return self._within("bytes", parse_size(size), 1.0, float(self.problem.overhead))
        assert cost is not None
        return self._within(self.cost, cost, 1.0, 0.0)

    def uniform(self) -> tuple[tuple[str, Allocation], ...]:
        """The uniform formats, for comparison: (name, allocation)."""
        return self.problem.uniform()

    def knee(self) -> int:
        """Index of the point farthest below the chord between both ends; positive losses on a logarithmic scale."""
        if len(self) < 3:
            return len(self) - 1
        losses = np.log(self.losses) if self.losses[-1] > 0 else self.losses
        x = (self.costs - self.costs[0]) / (self.costs[-1] - self.costs[0])
        y = (losses - losses[-1]) / (losses[0] - losses[-1])
        return int(np.argmin(x + y))

    def hypervolume(self, cost: float, loss: float) -> float:
        """Area that the frontier dominates below a reference point (cost, loss); larger is better."""
        inside = (self.costs < cost) & (self.losses < loss)
        edges = np.append(self.costs[inside], cost)
        return float((np.diff(edges) * (loss - self.losses[inside])).sum())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        points: int = 1000,
        divergences: Mapping[int, tuple[float, float]] | None = None,
        columns: Mapping[str, Callable[[Allocation], float]] | None = None,
    ) -> None:
        """Write a CSV file: bits, all costs and `extra_columns` of at most `points` evenly spaced points.

        Its first line is `# ` and a checksum as JSON; `pandas.read_csv(path, comment="#")` reads it. Each layer has a
        column with its scheme. Measured `divergences` with their standard errors, by index of the point, fill two more
        columns; these points are always included. `columns` are further columns, by name.
        """
        measured = divergences or {}
        regular = np.linspace(0, len(self) - 1, min(points, len(self))).round().astype(int)
        shown = np.union1d(regular, np.array(sorted(measured), dtype=int))
        extra = ["divergence", "divergence_error"] if measured else []
        names = [layer.name for layer in self.problem.layers]
        body = io.StringIO()
        writer = csv.writer(body, lineterminator="\n")
        writer.writerow(["bits", *self.problem.costs, *self.extra_columns(0), *(columns or {}), *extra, *names])
        for index in shown.tolist():
            choices = self.choices[index]
            allocation = self.problem.allocation(choices)
            totals = [f"{total:.15g}" for total in self.problem.totals(choices).values()]
            measurements = measured.get(index, ("", "")) if measured else ()
            further = (column(allocation) for column in (columns or {}).values())
            cells = [*self.extra_columns(index).values(), *further, *measurements]
            writer.writerow([repr(allocation.bits), *totals, *cells, *allocation.schemes])
        header = {CHECKSUM: checksum({}, body.getvalue())}
        with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            stream.write(f"# {json.dumps(header)}\n{body.getvalue()}")

    def _sizes(self) -> Array:
        if self.cost != "size":
            raise MpqError(f"this frontier is in {self.cost}, not in size: give the budget as cost=")
        return self.costs

    def _within(self, unit: str, budget: float, factor: float, offset: float) -> int:
        """Index of the last point whose factor * cost + offset is within the budget."""
        possible = np.isfinite(self.problem.losses)
        largest = np.where(possible, self.problem.costs[self.cost], -np.inf).max(1).sum() * factor + offset
        smallest = self.costs[0] * factor + offset
        digits = 6 if unit == "bits" else 15
        reach = f"{smallest:.{digits}g} to {largest:.{digits}g} {unit} can be reached"
        if isinstance(budget, bool) or not isinstance(budget, Real) or not math.isfinite(budget):
            raise MpqError(f"invalid budget of {budget!r} {unit}: {reach}")
        limit = budget * (1 + 1e-12)  # budgets are often computed from the same totals: tolerate rounding errors
        if smallest > limit:
            raise MpqError(f"a budget of {budget:.{digits}g} {unit} is below the smallest allocation: {reach}")
        if budget * (1 - 1e-12) > largest:
            log.warning("a budget of %.*g %s is larger than any allocation: %s", digits, budget, unit, reach)
        return int(np.searchsorted(self.costs, (limit - offset) / factor, side="right")) - 1


@dataclass(frozen=True, eq=False)
class SavedFrontier:
    """Points of a file written by `Frontier.save`."""

    bits: Array  # (points,)
    losses: Array  # (points,), predicted
    measured: Array | None  # (points,), None where losses were not measured
    errors: Array  # (points,), standard errors of the measured losses, else of the predicted ones

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SavedFrontier":
        """Read a frontier's file; one that was edited loads with a warning.

        Raises:
            MpqError: a missing, incomplete or invalid file.
        """
        with reading(path, "frontier", "write it with --frontier again"):
            with open(path, newline="", encoding="utf-8") as stream:
                text = stream.read()
            header = {}
            if text.startswith("#"):
                first, text = text.split("\n", 1)
                header = dict(json.loads(first[1:]))
            heading, *rows = csv.reader(io.StringIO(text), strict=True)
            columns = dict(zip(reversed(heading), reversed(list(zip(*rows, strict=True))), strict=True))
            read = {
                column: np.array([float(cell) for cell in columns[column]])
                for column in ("bits", "loss", "error", MEASURED_COLUMN)
                if column != MEASURED_COLUMN or column in columns
            }
            check_edits(path, header.pop(CHECKSUM, None), header, text)
        return cls(read["bits"], read["loss"], read.get(MEASURED_COLUMN), read["error"])


def is_frontier(path: str | os.PathLike[str]) -> bool:
    """Whether a file's header is a frontier's, not a sensitivity table's."""
    try:
        with open(path, encoding="utf-8") as stream:
            first = stream.readline()
            return (stream.readline() if first.startswith("#") else first).startswith("bits,")
    except (OSError, UnicodeDecodeError):
        return False


def non_dominated(costs: ArrayLike, losses: ArrayLike) -> NDArray[np.intp]:
    """Indices of the non-dominated points by rising cost; of equal points the first.

    >>> non_dominated([3, 1, 2, 2], [1.0, 5.0, 6.0, 4.0]).tolist()
    [1, 3, 0]
    """
    costs, losses = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = losses[order][1:] < best[:-1]
    return order[kept & (best < math.inf)]
