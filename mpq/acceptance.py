"""Measured acceptance: the choice among finished candidates on data that neither scores nor search have seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, NotFiniteError, nearest_names
from mpq.core.frontier import Frontier
from mpq.core.problem import Choices, Problem
from mpq.evaluation import Quality
from mpq.measuring import Measurer
from mpq.rounding.store import Rounder
from mpq.search.measured import polish, ranked, starts
from mpq.training.tuned_scales import Tuning

ROUNDS = {"fast": 0, "normal": 8, "best": 64}  # allocations that polishing measures, by effort
STEPS = {"fast": 0, "normal": 60, "best": 200}  # to tune the scales of the chosen allocation
SAMPLES = {"perplexity": 4, "accuracy": 32}  # samples of a step: a text has hundreds of predictions, an image one
FINALISTS = 4  # searched candidates that are measured on acceptance data


@dataclass(frozen=True, eq=False)
class Candidate:
    """An allocation as it would be exported, with its quality on acceptance data."""

    name: str
    allocation: Allocation
    quality: Quality
    means: Mapping[str, Tensor] = field(default_factory=dict)  # corrected running means, where that helps
    rounder: Rounder | None = None  # finished weights if scales were tuned; otherwise the measurer's store serves

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one format."""
        return len(set(self.allocation.schemes)) == 1 and not self.allocation.assignments

    def harm(self) -> float:
        """Mean divergence from the original; the loss for models without logits."""
        return self.harm_with_error()[0]

    def beats(self, other: "Candidate") -> bool:
        """Whether its harm on the same data is smaller by more than a standard error of the paired difference."""
        difference, error = self.quality.harm_above(other.quality)
        return difference < -error

    def harm_with_error(self) -> tuple[float, float]:
        """The same with its standard error."""
        return self.quality.harm_with_error()


@dataclass(frozen=True, eq=False)
class Acceptance:
    """All candidates within the budget, the one of least measured harm first."""

    candidates: tuple[Candidate, ...]
    established: bool  # measured on data that nothing was tuned on

    @property
    def chosen(self) -> Candidate:
        """The candidate that is exported."""
        return self.candidates[0]

    @property
    def uniform(self) -> Candidate | None:
        """The best uniform format within the budget; None if none fits."""
        return next((one for one in self.candidates if one.is_uniform and one.rounder is None), None)

    @property
    def untuned(self) -> Candidate | None:
        """The choice before its scales were tuned; None if they were not tuned."""
        return self.candidates[1] if self.chosen.rounder is not None else None

    def corrections(self) -> tuple[str, ...]:
        """One sentence for each correction of the choice after rounding."""
        sentences = []
        if self.chosen.means:
            sentences.append(f"Running means of {len(self.chosen.means)} batch normalizations were re-estimated.")
        if self.untuned is not None:
            difference, error = self.chosen.quality.harm_above(self.untuned.quality)
            sentences.append(
                f"Scales tuned against the original took its KL divergence from {self.untuned.harm():.4g} to "
                f"{self.chosen.harm():.4g} (difference {difference:.3g} +- {error:.1g}) without changing the size."
            )
        return tuple(sentences)

    def verdict(self) -> str:
        """One sentence: how the choice compares with the best uniform format within its size."""
        what = "KL divergence" if self.chosen.quality.divergence is not None else "loss"
        uniform = self.uniform
        caveat = "" if self.established else " Not established on unseen data: the source has none to spare."
        if uniform is None:
            return f"No uniform format fits the budget.{caveat}"
        if self.chosen.is_uniform:
            return f"No searched allocation beats {uniform.name} at this size, so {uniform.name} is exported.{caveat}"
        difference, error = self.chosen.quality.harm_above(uniform.quality)
        words = "less" if -difference > 2 * error else "not significantly less"
        return (
            f"Measured {what} {self.chosen.harm():.4g}, {words} than {uniform.harm():.4g} of {uniform.name}, the best "
            f"uniform format within the budget (difference {difference:.3g} +- {error:.1g}).{caveat}"
        )


def accept(
    frontier: Frontier,
    size: float,
    measurer: Measurer,
    *,
    effort: str = "normal",
    seed: int = 0,
    fits: Callable[[Allocation], bool] = lambda allocation: True,
) -> Acceptance:
    """Measure the most promising starts, polish the best of them, and sort all by measured harm.

    The largest uniform formats within the size (three, and any as large) are candidates too, so the choice is at least
    as good on acceptance data as each of them.

    Args:
        frontier: predicted, in size.
        size: bytes that the layers may take.
        measurer: of the model.
        effort: "fast" measures the first starts alone; "normal" and "best" measure all of them on calibration data,
            and polish the best.
        seed: of the proposals.
        fits: whether an allocation is within all budgets, the file's size with its header included.

    Raises:
        MpqError: an unknown effort, or no candidate that gives finite numbers.
    """
    check_effort(effort)
    problem = frontier.problem
    size = min(size, float(frontier.costs[-1]))
    begun = [(name, choices) for name, choices in starts(frontier, size) if fits(problem.allocation(choices))]
    if ROUNDS[effort] and begun:
        begun = _polished(frontier, begun, size, measurer, ROUNDS[effort], seed)
    begun = [(name, choices) for name, choices in begun if not _is_uniform(problem, choices)]
    own = ((name, problem.allocation(choices)) for name, choices in begun)
    searched = dict([(name, one) for name, one in own if fits(one)][:FINALISTS])
    uniform = [(f"all {name}", one) for name, one in problem.uniform() if one.size <= size]
    uniform = sorted(uniform, key=lambda item: -item[1].size)[: max(FINALISTS - 1, 1)]
    both = [(name, one) for name, one in [*searched.items(), *uniform] if fits(one)]
    candidates = [candidate_of(name, one, measurer) for name, one in both]
    finite = [candidate for candidate in candidates if candidate is not None]
    if not finite:
        raise MpqError("no allocation within the budget gives finite numbers: raise the budget or add formats")
    return Acceptance(tuple(sorted(finite, key=Candidate.harm)), bool(measurer.source.acceptance))


def check_effort(effort: str) -> None:
    """MpqError for an unknown effort."""
    if effort not in ROUNDS:
        raise MpqError(f"unknown effort {effort!r}: {nearest_names(effort, ROUNDS)}")


def with_tuned_scales(acceptance: Acceptance, measurer: Measurer, tuning: Tuning) -> Acceptance:
    """Tune the choice's scales against the original; the result is put first if it is better on acceptance data."""
    chosen = acceptance.chosen
    if tuning.steps < 1 or chosen.quality.divergence is None:
        return acceptance
    rounder = measurer.tuned(chosen.allocation, tuning, chosen.means)
    try:
        quality = measurer.quality(chosen.allocation, "acceptance", chosen.means, rounder)
    except NotFiniteError:
        return acceptance
    tuned = replace(chosen, name=f"{chosen.name}, scales tuned", quality=quality, rounder=rounder)
    return replace(acceptance, candidates=(tuned, *acceptance.candidates)) if tuned.beats(chosen) else acceptance


def candidate_of(name: str, allocation: Allocation, measurer: Measurer) -> Candidate | None:
    """The allocation, with corrected means if these are better on acceptance data; None if it breaks the model."""
    try:
        plain = Candidate(name, allocation, measurer.quality(allocation, "acceptance"))
    except NotFiniteError:
        plain = None
    if not measurer.corrects:
        return plain
    try:
        means = measurer.means(allocation)
        corrected = Candidate(name, allocation, measurer.quality(allocation, "acceptance", means), means)
    except NotFiniteError:
        return plain
    if plain is None:
        return corrected
    return corrected if corrected.beats(plain) else plain


def _polished(
    frontier: Frontier, begun: list[tuple[str, Choices]], size: float, measurer: Measurer, rounds: int, seed: int
) -> list[tuple[str, Choices]]:
    """The starts by rising harm on calibration data, preceded by an improved version of the best, if one was found."""

    def measure(choices: Choices, part: str) -> NDArray[np.float64]:
        allocation = frontier.problem.allocation(choices)
        reference = measurer.reference(part).quality
        try:
            quality = measurer.quality(allocation, part, measurer.means(allocation, searching=True))
        except NotFiniteError:
            return np.full(len(reference.losses), np.inf)
        harm = quality.harm if quality.divergence is not None else quality.harm - reference.harm
        weighted: NDArray[np.float64] = harm * quality.weights / quality.weights.mean()
        return weighted

    if bool((np.isfinite(frontier.problem.losses).sum(1) == 1).all()):
        return begun  # nothing to choose
    measures = [partial(measure, part=part) for part in measurer.searching]
    ordered, losses = ranked(begun, measures)
    best = ordered[0][1]
    polished = polish(frontier.problem, best, size, measures, rounds=rounds, seed=seed, measured=losses).choices
    return ordered if np.array_equal(polished, best) else [("polished", polished), *ordered]


def _is_uniform(problem: Problem, choices: Choices) -> bool:
    return bool((choices == choices[0]).all()) and not problem.is_mix(int(choices[0]))
