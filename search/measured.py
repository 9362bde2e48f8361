"""Search on measured losses: starting points, then an additive table corrected by measured allocations.

The losses of choices have a Gaussian posterior, whose prior mean is the table of scores. A sample of it is solved
exactly within a radius of changes around the best known allocation (Thompson sampling), the proposal is measured, and
the posterior is conditioned on the measurement (a Kalman update). Each of `measures` gives the losses of all samples of
a part of the data; proposals that are clearly worse on the first parts are not measured on the others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import Array, Choices, Problem, restricted
from mpq.core.scheme import parse_scheme
from mpq.search.exact import exact
from mpq.search.integer import integer
from mpq.search.rules import rules

Measure = Callable[[Choices], Array]  # losses (samples,) of a part of the data, not finite if the model breaks

NEAR = 0.97  # share of the budget; smaller uniform formats are not starts
FEWER = 2  # number of smallest widths that are left out in turn
DEVIATION = 0.4  # prior standard deviation, relative to a scaled score
MISFIT = 0.1  # share of a measured difference that an additive table does not explain
SMALLEST_RADIUS = 2
PATIENCE = 4  # known proposals in a row after which polishing ends
SECONDS = 5.0  # time limit of the integer program per proposal
CLEAR = 2.0  # standard errors of a paired difference beyond which nothing more is measured


def starts(frontier: Frontier, size: float) -> tuple[tuple[str, Choices], ...]:
    """Named choices within a size (of the layers, bytes) that a measured search begins with, each once.

    The frontier's own, every uniform format just below the size, the exact optima of whole layers (if there are mixes),
    of tables without the smallest widths, and of scores averaged over each kind of layer; then allocations by rules
    without scores (`mpq.search.rules`).
    """
    problem = frontier.problem
    candidates = [("searched", np.asarray(frontier.choices[frontier.index_at(cost=size)], dtype=np.intp))]
    for j in np.flatnonzero(np.isfinite(problem.losses).all(0)).tolist():
        uniform = np.full(len(problem.groups), j, dtype=np.intp)
        if NEAR * size <= problem.totals(uniform)["size"] <= size:
            candidates.append((f"all {problem.schemes[j]}", uniform))
    whole = [name for j, name in enumerate(problem.schemes) if not problem.is_mix(j)]
    if len(whole) < len(problem.schemes) and (choices := _optimum(problem, whole, size)) is not None:
        candidates.append(("searched by whole layers", choices))
    narrowest = {
        name: min(format.grid.bits for format in parse_scheme(name).weight.members) for name in problem.schemes
    }
    for smallest in sorted(set(narrowest.values()))[1 : FEWER + 1]:
        choices = _optimum(problem, [name for name, width in narrowest.items() if width >= smallest], size)
        if choices is None:
            break
        candidates.append((f"searched from {smallest} bits", choices))
    pooled = replace(problem, losses=_pooled(problem))
    if (choices := _optimum(pooled, whole, size)) is not None:
        candidates.append(("searched by kind", choices))
    candidates += rules(problem, size).items()
    seen: dict[tuple[int, ...], tuple[str, Choices]] = {}
    for name, choices in candidates:
        seen.setdefault(tuple(choices.tolist()), (name, choices))
    return tuple(seen.values())


def _optimum(problem: Problem, schemes: Sequence[str], size: float) -> Choices | None:
    """The exact optimum among some of the schemes; None if the budget, or a pinned layer, needs others."""
    try:
        part = restricted(problem, schemes)
        solved = exact(part)
        choices = solved.choices[solved.index_at(cost=min(size, solved.costs[-1]))]
    except MpqError:
        return None
    return np.array([problem.schemes.index(part.schemes[choice]) for choice in choices.tolist()], dtype=np.intp)


def _pooled(problem: Problem) -> Array:
    """Losses (groups, schemes) averaged over groups of one kind: of equal shapes, and names that differ in numbers."""
    kinds: dict[object, list[int]] = {}
    for group, members in enumerate(problem.groups):
        first = problem.layers[members[0]]
        kinds.setdefault((re.sub(r"\d+", "#", first.name), first.rows, first.cols, len(members)), []).append(group)
    losses = problem.losses.copy()
    for alike in kinds.values():
        possible = np.isfinite(losses[alike])
        means = np.where(possible, losses[alike], 0.0).sum(0) / np.maximum(possible.sum(0), 1)
        losses[alike] = np.where(possible, means, np.inf)
    return losses


@dataclass
class Belief:
    """Gaussian posterior of each choice's loss: independent normal priors and measured differences."""

    mean: Array  # (groups, schemes)
    deviation: Array  # (groups, schemes)
    origin: Choices  # (groups,), the choices from which differences are measured
    rows: list[Array] = field(default_factory=list)  # (groups * schemes,): +1 where chosen, -1 where the origin was
    seen: list[float] = field(default_factory=list)  # measured differences
    noise: list[float] = field(default_factory=list)  # their variances

    @classmethod
    def of(cls, problem: Problem, origin: Choices, measured: float) -> "Belief":
        """The scores, scaled to the measured loss of the origin."""
        possible = np.isfinite(problem.losses)
        scores = np.where(possible, np.maximum(problem.losses, 0.0), 0.0)
        predicted = float(scores[np.arange(len(origin)), origin].sum())
        scale = measured / predicted if measured > 0 and predicted > 0 else 1.0
        deviations = np.sqrt((DEVIATION * scores) ** 2 + np.where(possible, problem.variances, 0.0))
        return cls(scale * scores, scale * deviations, origin)

    def learn(self, choices: Choices, difference: float, error: float) -> None:
        """Condition on the measured loss of choices relative to the origin's."""
        row = np.zeros(self.mean.shape)
        groups = np.arange(len(choices))
        row[groups, choices] += 1
        row[groups, self.origin] -= 1
        self.rows.append(row.ravel())
        self.seen.append(difference)
        self.noise.append(error**2 + (MISFIT * difference) ** 2 + np.finfo(np.float64).tiny)

    def draw(self, generator: np.random.Generator) -> Array:
        """A sample of the posterior, a table (groups, schemes)."""
        return self._conditioned(self.mean + self.deviation * generator.standard_normal(self.mean.shape), generator)

    def expected(self) -> Array:
        """The posterior mean, a table (groups, schemes)."""
        return self._conditioned(self.mean, None)

    def _conditioned(self, table: Array, generator: np.random.Generator | None) -> Array:
        """Matheron's rule: a draw of the prior, corrected by what was measured, is a draw of the posterior."""
        if not self.rows:
            return table
        rows, noise = np.stack(self.rows), np.array(self.noise)
        covariances = rows * self.deviation.ravel() ** 2
        differences = np.array(self.seen)
        if generator is not None:
            differences = differences + np.sqrt(noise) * generator.standard_normal(len(noise))
        covariance = covariances @ rows.T + np.diag(noise)
        gain = np.linalg.lstsq(covariance, differences - rows @ table.ravel(), rcond=None)[0]
        return table + (gain @ covariances).reshape(table.shape)


def race(choices: Choices, measures: Sequence[Measure], best: Array | None = None) -> Array:
    """Losses of all samples, part after part, or of the first parts where they are clearly above the best ones there.

    Args:
        choices: to measure.
        measures: of the parts of the data.
        best: losses (samples,) of the best choices known, on all parts.
    """
    losses = np.empty(0)
    for measure in measures:
        losses = np.concatenate([losses, measure(choices)])
        if best is None:
            continue
        gap, error = _paired(losses, best[: len(losses)])
        if not gap <= CLEAR * error:  # NaN included
            break
    return losses


def ranked(
    starts: Sequence[tuple[str, Choices]], measures: Sequence[Measure]
) -> tuple[list[tuple[str, Choices]], Array]:
    """Named choices by rising measured loss, and the losses (samples,) of the first one."""
    best = race(starts[0][1], measures)
    gaps = [0.0]
    for _, choices in starts[1:]:
        losses = race(choices, measures, best if np.isfinite(best).all() else None)
        gap = _paired(losses, best[: len(losses)])[0]
        if len(losses) == len(best) and gap < 0:
            gaps, best, gap = [other - gap for other in gaps], losses, 0.0
        gaps.append(gap)
    order = np.argsort(np.nan_to_num(gaps, nan=np.inf), kind="stable")
    return [starts[place] for place in order.tolist()], best


@dataclass(frozen=True, eq=False)
class Polished:
    """Result of `polish`."""

    choices: Choices  # (groups,)
    measured: tuple[tuple[Choices, float], ...]  # all measured choices, with their loss above the start's


def polish(
    problem: Problem,
    start: Choices,
    size: float,
    measures: Sequence[Measure],
    *,
    rounds: int = 24,
    seed: int = 0,
    measured: Array | None = None,
) -> Polished:
    """Improve choices by measuring: at most `rounds` allocations besides the start, none above `size` bytes.

    A proposal is accepted when it is better by more than a standard error of the paired difference. The radius of
    changes grows with success and shrinks with failure.

    Args:
        problem: whose losses are the scores.
        start: the initial choices.
        size: maximum bytes of the layers.
        measures: of the parts of the data.
        rounds: allocations to measure.
        seed: of the proposals.
        measured: losses (samples,) of the start, if known.
    """
    generator = np.random.default_rng(seed)
    best = np.asarray(start, dtype=np.intp)
    losses = origin = race(best, measures) if measured is None else measured
    history = [(best, 0.0)]
    fixed = bool((np.isfinite(problem.losses).sum(1) == 1).all())
    if not np.isfinite(losses).all() or rounds < 1 or fixed:
        return Polished(best, tuple(history))
    belief = Belief.of(problem, best, float(losses.mean()))
    known = {tuple(best.tolist())}
    radius = max(SMALLEST_RADIUS, len(best) // 3)
    idle = 0
    while len(history) <= rounds and idle < PATIENCE:
        table = belief.draw(generator) if idle < PATIENCE - 1 else belief.expected()
        proposal = nearby(problem, table, best, radius, size)
        if tuple(proposal.tolist()) in known:
            idle += 1
            continue
        idle = 0
        known.add(tuple(proposal.tolist()))
        new = race(proposal, measures, losses)
        difference, its_error = _paired(new, origin[: len(new)])
        history.append((proposal, difference))
        if not np.isfinite(new).all():
            radius = max(SMALLEST_RADIUS, radius // 2)
            continue
        belief.learn(proposal, difference, its_error)
        gap, error = _paired(new, losses[: len(new)])
        if len(new) == len(losses) and gap < -error:
            best, losses, radius = proposal, new, min(2 * radius, len(best))
        else:
            radius = max(SMALLEST_RADIUS, 2 * radius // 3)
    return Polished(best, tuple(history))


def nearby(problem: Problem, table: Array, center: Choices, radius: int, size: float) -> Choices:
    """The choices of least loss by a table, within a size and at most `radius` changes away from the center."""
    changes = np.ones(problem.losses.shape)
    changes[np.arange(len(center)), center] = 0.0
    posed = replace(
        problem, losses=np.where(np.isfinite(problem.losses), table, np.inf),
        costs={**problem.costs, "changes": changes}, budgets={**problem.budgets, "size": size, "changes": radius},
    )  # fmt: skip
    return np.asarray(integer(posed, time_limit=SECONDS).choices[0], dtype=np.intp)


def _paired(losses: Array, others: Array) -> tuple[float, float]:
    """Mean difference of losses on the same samples, and its standard error."""
    with np.errstate(invalid="ignore"):  # infinite ones
        difference = losses - others
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        return float(difference.mean()), float(error)
