"""`mpq export`: an allocation written for a target, with a README on its quality and how to serve it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpq.card import circumstances, write_card
from mpq.comparison import Measured, sentences
from mpq.core.allocation import Allocation
from mpq.exporters.holding import warn_about_versions
from mpq.exporters.targets import TARGETS
from mpq.exporting import export_to, sizer_for
from mpq.measuring import Measurer
from mpq.network.storage import state_bytes
from mpq.resolving import Resolved
from mpq.rounding.store import RoundingStore
from mpq.sources import Source

UNMEASURED = "Its quality was not measured when it was written."


@dataclass(frozen=True, eq=False)
class ExportedFolder:
    """Result of `export_folder`."""

    folder: Path
    measured: tuple[Measured, ...]  # original, before solving again, as written; empty if not measured
    resolved: Resolved | None

    def words(self) -> tuple[str, ...]:
        """What was changed and measured, in sentences."""
        lines = () if self.resolved is None else (f"{self.resolved.sentence()}.",)
        if not self.measured:
            return (*lines, UNMEASURED)
        if self.resolved is not None:
            lines = (*lines, self.resolved.measured(self.measured[-1].quality, self.measured[-2].quality))
        return (*lines, *sentences(self.measured))


def export_folder(
    source: Source,
    allocation: Allocation,
    folder: str | os.PathLike[str],
    *,
    target: str,
    store: RoundingStore,
    resolved: Resolved | None = None,
    measure: bool = True,
    progress: bool = True,
) -> ExportedFolder:
    """Write an allocation for a target, and its page beside it.

    Args:
        source: model and data.
        allocation: what the target can hold.
        folder: made when missing.
        target: a name of `mpq.exporters.targets.TARGETS`.
        store: of the layers, rounded.
        resolved: the allocation before it was solved again, which is measured too.
        measure: whether to measure on unseen data.
        progress: show progress bars.

    Raises:
        MpqError: what the exporter refuses.
    """
    started, consumer = time.monotonic(), TARGETS.named(target)
    warn_about_versions(consumer)
    sized = sizer_for(consumer, source)
    measured: tuple[Measured, ...] = ()
    if measure:
        measured = _measured(Measurer(source, store, progress), allocation, resolved, sized)
    written = export_to(target, source, allocation, folder, store)
    exported = ExportedFolder(written, measured, resolved)
    if written.is_dir():
        write_card(
            written, title=f"{source.name} at {allocation.bits:.2f} bits per weight", target=consumer,
            rows=[one.row(chosen=one is measured[-1]) for one in measured], words=exported.words(),
            settings=circumstances(source.model, time.monotonic() - started), cache=allocation.cache,
        )  # fmt: skip
    return exported


def _measured(
    measurer: Measurer, allocation: Allocation, resolved: Resolved | None, file_size: Callable[[Allocation], int]
) -> tuple[Measured, ...]:
    reference = measurer.reference("evaluation").quality

    def measured(name: str, allocation: Allocation) -> Measured:
        return Measured.of(name, allocation, measurer.quality(allocation, "evaluation"), reference, file_size)

    original = Measured("original", None, state_bytes(measurer.source.model), reference, 0.0, 0.0)
    before = () if resolved is None else (measured("before it was solved again", resolved.before),)
    return (original, *before, measured("mpq, simulated", allocation))
