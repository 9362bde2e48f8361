"""Solving an allocation again from its table under a target's rules, if the target does not support it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpq.core.allocation import Allocation
from mpq.core.costs import weight_bytes
from mpq.core.errors import MpqError
from mpq.core.registry import Target
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.evaluation import Quality
from mpq.exporters.holding import FLOAT, check, restrict
from mpq.search import frontier_of

TABLE = "table.csv"  # beside the allocation, in the folder of a whole job


@dataclass(frozen=True, eq=False)
class Resolved:
    """A replacement of an allocation, and its reason."""

    allocation: Allocation
    before: Allocation
    why: str  # the target's objection
    floats: int  # layers that the target keeps in floating point

    def sentence(self) -> str:
        """What was changed and why."""
        pairs = zip(self.before.schemes, self.allocation.schemes, strict=True)
        changed = sum(one != other for one, other in pairs)
        kept = f", {self.floats} of them in floating point, which do not count in the budget" if self.floats else ""
        return (
            f"{self.why}. Solved again from the table: {changed} of {len(self.allocation.layers)} layers have other "
            f"formats{kept}; {self.allocation.bits:.3f} bits instead of {self.before.bits:.3f}"
        )

    def measured(self, new: Quality, old: Quality) -> str:
        """Both allocations' quality on unseen data."""
        difference, error = new.harm_above(old)
        what = "loss" if new.divergence is None else "KL from the original"
        return (
            f"Measured on unseen data: {new} instead of {old}; {what} {new.harm_with_error()[0]:.4g} instead of "
            f"{old.harm_with_error()[0]:.4g} (difference {difference:.3g} +- {error:.1g})."
        )


def table_beside(allocation: Allocation, file: Path) -> SensitivityTable | None:
    """The table that an allocation's file was made from: the one that it names, or `TABLE` beside it."""
    named = allocation.provenance.get("table")
    places = [Path(named), file.parent / named] if isinstance(named, str) else []
    path = next((place for place in (*places, file.parent / TABLE) if place.is_file()), None)
    return None if path is None else SensitivityTable.load(path)


def held_or_resolved(
    target: Target, allocation: Allocation, table: SensitivityTable | None, strict: bool = False
) -> Resolved | None:
    """None if the target supports the allocation; else the best supported one of the same bytes, or the smallest.

    Layers that the target must keep in floating point do not count in the budget of the others.

    Args:
        target: program that reads the files.
        allocation: searched for another target.
        table: of its layers; None where there is none.
        strict: whether to refuse instead.

    Raises:
        MpqError: the target's refusal, where it is strict or there is no table; a table of other layers, or
            with no format that it supports.
    """
    try:
        check(target, allocation)
        return None
    except MpqError as error:
        why = str(error).partition(": ")[0]
        if strict:
            raise
        if table is None:
            raise MpqError(f"{error}; or name the table that it was made from (--table), to solve again") from error
    table = table.weights()
    if tuple(layer.name for layer in table.layers) != tuple(layer.name for layer in allocation.layers):
        raise MpqError(f"{why}, and its table has other layers: name the table that it was made from (--table)")
    held = restrict(table, target)
    if len(held.floats) == len(table.layers):
        raise MpqError(
            f"{why}, nor any format of its table: quantize with --for {target.name}, whose formats are then the "
            "candidates"
        )
    float_bytes = _bytes(held.floats, allocation, FLOAT)
    budget = allocation.size - _bytes(held.floats, allocation) + float_bytes
    frontier = frontier_of(held.table, forbid=held.forbid)
    candidate = frontier.at(cost=float(np.clip(budget, frontier.costs[0], frontier.costs[-1])))
    provenance = {**allocation.provenance, **candidate.provenance, "solved_for": target.name}
    return Resolved(
        replace(candidate, provenance=provenance, cache=allocation.cache), allocation, why, len(held.floats)
    )


def _bytes(names: Mapping[str, str], allocation: Allocation, scheme: str = "") -> int:
    """Bytes of these layers in an allocation, or all in one scheme."""
    scheme_of = allocation.scheme_of
    return sum(
        weight_bytes(parse_scheme(scheme) if scheme else scheme_of[layer.name], layer.rows, layer.cols)
        for layer in allocation.layers
        if layer.name in names
    )
