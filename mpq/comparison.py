"""Comparison of the original, uniform formats and the packed model on the same unseen data, as table and sentences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mpq.acceptance import Acceptance, Candidate, candidate_of
from mpq.core.allocation import Allocation
from mpq.core.frontier import Frontier
from mpq.core.prediction import predicts_loss
from mpq.evaluation import DIVERGE, Quality
from mpq.measuring import Measurer
from mpq.report import Row

NEAREST = 1  # uniform candidates that are measured beside the best and the usual ones
USUAL = {
    "perplexity": ("int4-g64", "int3-g64"),
    "accuracy": ("int4-channel", "int3-channel"),
}  # usual baselines
ALONG = 3  # points of the frontier that are measured
RANGE = 1.6  # largest ratio to the chosen size; usual formats farther away are omitted


@dataclass(frozen=True)
class Measured:
    """An allocation (None: the original model) with its measured quality."""

    name: str
    allocation: Allocation | None
    size: int  # bytes of the whole model's file
    quality: Quality
    increase: float  # measured loss increase
    error: float  # its standard error, over paired samples

    @classmethod
    def of(
        cls, name: str, allocation: Allocation, quality: Quality, reference: Quality,
        file_size: Callable[[Allocation], int],
    ) -> "Measured":  # fmt: skip
        """An allocation beside the original's quality on the same data."""
        return cls(name, allocation, file_size(allocation), quality, *quality.loss_above(reference))

    @property
    def harm(self) -> tuple[float, float]:
        """The predicted quantity as measured, with its standard error: KL from the original, or the loss increase."""
        divergence = self.quality.divergence
        return (self.increase, self.error) if divergence is None else divergence.mean()

    def to_json(self) -> dict[str, Any]:
        """Size, measured quality and harm as JSON values."""
        divergence = self.quality.divergence
        return {
            "name": self.name, "bytes": self.size, "bits": None if self.allocation is None else self.allocation.bits,
            "quality": self.quality.value, "loss": self.quality.loss, "increase": self.increase, "error": self.error,
            "divergence": None if divergence is None else divergence.mean()[0],
            "flips": None if divergence is None else divergence.flipping()[0],
        }  # fmt: skip

    def row(self, chosen: bool = False) -> Row:
        """The line of the before/after table."""
        if self.allocation is None:
            size = megabytes(self.size) if self.size else ""
            return Row(self.name, "", size, str(self.quality), *self._divergence(), "", "")
        known = not math.isnan(self.allocation.loss) and predicts_loss(self.allocation.metric)
        predicted = f"{self.allocation.loss:.4g}" if known else ""
        increase = _with_error(self.increase, self.error)
        return Row(
            self.name, f"{self.allocation.bits:.3f}", megabytes(self.size), str(self.quality), *self._divergence(),
            predicted, increase, chosen,
        )  # fmt: skip

    def _divergence(self) -> tuple[str, str, str]:
        """KL, agreement and flips."""
        divergence = self.quality.divergence
        if divergence is None:
            return "", "", ""
        same, flips = (
            f"{100 * share:.1f} % +- {100 * error:.1f}"
            for share, error in (divergence.agreeing(), divergence.flipping())
        )
        return f"{_with_error(*divergence.mean())} (99 %: {divergence.quantile:.2g})", same, flips


def compare(
    measurer: Measurer,
    frontier: Frontier,
    acceptance: Acceptance,
    packed: nn.Module | None,
    original_size: int,
    file_size: Callable[[Allocation], int],
) -> tuple[Measured, ...]:
    """The original, the noise floor (`Measurer.noise_floor`), uniform formats from large to small, and the packed model
    (None: simulated), on evaluation data.
    """
    reference = measurer.reference("evaluation").quality
    chosen = acceptance.chosen.allocation
    measured = partial(Measured.of, reference=reference, file_size=file_size)

    rows = [Measured("original", None, original_size, reference, 0.0, 0.0)]
    if reference.kind in DIVERGE:
        rows.append(Measured("noise floor", None, 0, measurer.noise_floor("evaluation"), 0.0, 0.0))
    known = {candidate.name: candidate for candidate in acceptance.candidates}
    for name, allocation in _uniform(frontier, acceptance, measurer.source.kind):
        candidate = known.get(name) or candidate_of(name, allocation, measurer)
        if candidate is not None:
            rows.append(measured(name, allocation, measurer.quality(allocation, "evaluation", candidate.means)))
    if packed is None:
        quality = measurer.quality(chosen, "evaluation", acceptance.chosen.means, acceptance.chosen.rounder)
        return (*rows, measured("mpq, simulated", chosen, quality))
    rows.append(measured("mpq, packed", chosen, measurer.quality_of(packed, "evaluation")))
    return tuple(rows)


def _uniform(frontier: Frontier, acceptance: Acceptance, kind: str) -> list[tuple[str, Allocation]]:
    """The best and nearest uniform candidates, and the usual formats, which need not be candidates; large first."""
    chosen, best = acceptance.chosen.allocation, acceptance.uniform
    candidates = sorted(frontier.uniform(), key=lambda item: abs(item[1].bits - chosen.bits))[:NEAREST]
    allocations = {f"all {name}": allocation for name, allocation in candidates}
    if best is not None:
        allocations[best.name] = best.allocation
    for name in USUAL.get(kind, ()):
        allocation = Allocation(
            chosen.layers, (name,) * len(chosen.layers), overhead=chosen.overhead, cache=chosen.cache
        )
        if f"all {name}" not in allocations and 1 / RANGE < allocation.bits / chosen.bits < RANGE:
            allocations[f"all {name}"] = dict(frontier.uniform()).get(name, allocation)
    return sorted(allocations.items(), key=lambda item: -item[1].bits)


def along(frontier: Frontier, chosen: Allocation, measurer: Measurer) -> dict[int, Candidate]:
    """Points of the predicted frontier, by index, at the sizes of uniform formats nearby, on acceptance data."""
    sizes = sorted((one.size for _, one in frontier.uniform()), key=lambda size: abs(size - chosen.size))
    near = [size for size in sizes if 1 / RANGE < size / chosen.size < RANGE][:ALONG]
    indices = sorted({frontier.index_at(cost=min(size, float(frontier.costs[-1]))) for size in near})
    candidates = {index: candidate_of(f"point {index}", frontier.allocation(index), measurer) for index in indices}
    return {index: candidate for index, candidate in candidates.items() if candidate is not None}


def on_other_text(measurer: Measurer, acceptance: Acceptance, packed: nn.Module | None) -> str:
    """One sentence: the divergence on text of another kind than all the rest; "" where the source has none."""
    source, chosen = measurer.source, acceptance.chosen
    if not source.other:
        return ""
    if packed is None:
        quality = measurer.quality(chosen.allocation, "other", chosen.means, chosen.rounder)
    else:
        quality = measurer.quality_of(packed, "other")
    kl, error = quality.harm_with_error()
    return f"On text of another kind ({source.other_name}) the KL divergence is {_with_error(kl, error)}."


def sentences(measured: Sequence[Measured], acceptance: Acceptance | None = None) -> tuple[str, ...]:
    """The table in sentences: harm of the last line, gain over the best accepted uniform format, error of the
    prediction.
    """
    chosen, uniform = measured[-1], None if acceptance is None else acceptance.uniform
    assert chosen.allocation is not None
    what = "KL divergence from the original" if chosen.quality.divergence is not None else "loss increase"
    harm, error = chosen.harm
    lines = [f"On unseen data the {what} is {_with_error(harm, error)}."]
    if acceptance is not None and uniform is not None and uniform is not acceptance.chosen:
        best = next(one for one in measured if one.name == uniform.name)
        difference, difference_error = chosen.quality.harm_above(best.quality)
        share = f", {100 * -difference / best.harm[0]:.0f} % less" if difference < 0 < best.harm[0] else ""
        lines.append(
            f"{best.name[:1].upper()}{best.name[1:]}, the best uniform format within the budget, has {best.harm[0]:.4g}"
            f"{share} (paired difference {difference:.3g} +- {difference_error:.1g})."
        )
    predicted = chosen.allocation.loss
    if predicted > 0 and harm > 0 and predicts_loss(chosen.allocation.metric):
        ratio = harm / predicted
        side = f"{ratio:.2g} times too low" if ratio >= 1 else f"{1 / ratio:.2g} times too high"
        untuned = acceptance is not None and acceptance.untuned is not None
        lines.append(f"The prediction was {predicted:.4g}{', before scales were tuned' if untuned else ''}, {side}.")
    return tuple(lines)


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g} +- {error:.1g}" if math.isfinite(error) else f"{value:.4g}"


def megabytes(size: float) -> str:
    """Bytes as text: kB below a million, MB (10**6) above.

    >>> megabytes(1_234_567), megabytes(65_000)
    ('1.23 MB', '65.0 kB')
    """
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
