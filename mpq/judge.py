"""Rank metrics by agreement with measured loss, on random allocations of this model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.problem import Array, Problem, build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.network.calibration import Batch, LossFn, check_batches, evaluating
from mpq.rounding.store import RoundingStore, moments_needed
from mpq.search.exact import exact
from mpq.sensitivity.loss import batch_losses, batch_shares, in_scheme
from mpq.sensitivity.task import Task

BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Interval:
    """A figure and the middle 95 % of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Verdict:
    """Quality of one metric's predictions."""

    metric: str
    spearman: Interval  # over all allocations: mostly of size
    kendall: Interval
    at_fixed_size: Interval  # Spearman within each budget, averaged over budgets
    regrets: Array  # (budgets,), measured loss of its own allocation above the best known at that budget

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "metric": self.metric, "spearman": self.spearman.value, "kendall": self.kendall.value,
            "at_fixed_size": self.at_fixed_size.value, "regrets": self.regrets.tolist(),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judgement:
    """Measurements, predictions and verdicts."""

    budgets: tuple[float, ...]  # average bits per weight
    stratum: NDArray[np.intp]  # (allocations,), index of the budget
    bits: Array  # (allocations,)
    measured: Array  # (allocations,), loss increase
    predicted: Mapping[str, Array]  # by metric: (allocations,)
    chosen: Mapping[str, Array]  # by metric: measured loss increase of its own allocation at each budget, (budgets,)
    best: Array  # (budgets,), least loss increase known of an allocation within the budget
    verdicts: tuple[Verdict, ...]  # best first: by total regret
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = "".join(f"{f'{budget:g} bits':>11}" for budget in self.budgets)
        lines = [f"{'metric':12} {'Spearman':>22} {'Kendall':>22} {'at fixed size':>24}  regret at{shown}"]
        lines += [
            f"{verdict.metric:12} {verdict.spearman!s:>22} {verdict.kendall!s:>22} {verdict.at_fixed_size!s:>24}  "
            f"         {''.join(f'{regret:>11.4f}' for regret in verdict.regrets)}"
            for verdict in self.verdicts
        ]
        lines.append(f"{'best known loss increase':94}{''.join(f'{loss:>11.4f}' for loss in self.best)}")
        return "\n".join(lines)


def judge(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    tables: Mapping[str, SensitivityTable],
    *,
    budgets: Sequence[float],
    count: int = 40,
    method: str = "mse",
    seed: int = 0,
    progress: bool = True,
) -> Judgement:
    """Measure random allocations, and each table's best one, at every budget.

    Args:
        model: the model that the tables are of; left unchanged.
        batches: data that the true loss is measured on, best other than the tables'.
        loss_fn: as `mpq.sensitivity.profile.profile` takes it.
        tables: by name, all of the same layers and schemes.
        budgets: average bits per weight.
        count: random allocations at each budget.
        method: rounding method.
        seed: of the random allocations and of the bootstrap.
        progress: show a progress bar.

    Raises:
        MpqError: no tables or budgets, tables of different layers or schemes, or a budget out of reach.
    """
    problems = _problems(tables)
    if not budgets or count < 3:
        raise MpqError(
            f"invalid options of judge: expected 1 budget and 3 allocations or more, not {len(budgets)} and {count}"
        )
    first = next(iter(problems.values()))
    generator = np.random.default_rng(seed)
    choices = [random_choices(first, bits, generator) for bits in budgets for _ in range(count)]
    own = {name: [_best(problem, bits) for bits in budgets] for name, problem in problems.items()}
    with evaluating(model):
        measure = _measurer(model, check_batches(batches), loss_fn, first, method, progress)
        measured = measure(choices)
        chosen = {name: measure(choice) for name, choice in own.items()}
    stratum = np.repeat(np.arange(len(budgets)), count)
    every_bits = np.array([_bits(first, choice) for choice in choices])
    predicted = {
        name: np.array([problem.allocation(choice).loss for choice in choices]) for name, problem in problems.items()
    }
    best = np.array([
        min([*measured[every_bits <= bits], *(losses[k] for losses in chosen.values())])
        for k, bits in enumerate(budgets)
    ])  # fmt: skip
    verdicts = [
        _verdict(name, predicted[name], measured, stratum, chosen[name] - best, np.random.default_rng([seed, 1]))
        for name in problems
    ]
    verdicts.sort(key=lambda verdict: float(verdict.regrets.sum()))
    settings = {"count": count, "method": method, "seed": seed}
    return Judgement(
        tuple(budgets), stratum, every_bits, measured, predicted, chosen, best, tuple(verdicts), settings
    )  # fmt: skip


def random_choices(problem: Problem, bits: float, generator: np.random.Generator) -> NDArray[np.intp]:
    """A random scheme for each group, (groups,), as large as a budget of average bits allows.

    Every group draws a scheme evenly; random groups are then made smaller until the budget is met, and random ones
    larger while it still is.

    Raises:
        MpqError: the budget is below the smallest allocation.
    """
    size, budget = problem.costs["size"], bits * problem.weights / 8
    allowed = np.isfinite(problem.losses)
    least = np.where(allowed, size, np.inf).min(1).sum()
    if least > budget:
        raise MpqError(f"{bits:g} bits are below the smallest allocation's {8 * least / problem.weights:.4g}")
    groups = np.arange(len(size))
    choices = np.array([generator.choice(np.flatnonzero(row)) for row in allowed], dtype=np.intp)
    while size[groups, choices].sum() > budget:
        group = generator.choice(groups)
        smaller = np.flatnonzero(allowed[group] & (size[group] < size[group, choices[group]]))
        if len(smaller):
            choices[group] = generator.choice(smaller)
    for group in generator.permutation(groups):
        spare = budget - size[groups, choices].sum()
        current = size[group, choices[group]]
        larger = np.flatnonzero(allowed[group] & (size[group] > current) & (size[group] <= current + spare))
        if len(larger):
            choices[group] = generator.choice(larger)
    return choices


def _problems(tables: Mapping[str, SensitivityTable]) -> dict[str, Problem]:
    if not tables:
        raise MpqError("no tables to judge: expected at least one sensitivity table")
    first = next(iter(tables.values()))
    for name, table in tables.items():
        if (table.layers, table.schemes) != (first.layers, first.schemes):
            raise MpqError(f"the table {name!r} has other layers or schemes than the first: profile them alike")
    return {name: build_problem(table) for name, table in tables.items()}


def _best(problem: Problem, bits: float) -> NDArray[np.intp]:
    frontier = exact(problem)
    return np.asarray(frontier.choices[frontier.index_at(bits=bits)], dtype=np.intp)


def _bits(problem: Problem, choices: NDArray[np.intp]) -> float:
    return 8 * problem.totals(choices)["size"] / problem.weights


def _measurer(
    model: nn.Module, batches: tuple[Batch, ...], loss_fn: LossFn, problem: Problem, method: str, progress: bool
) -> Callable[[Sequence[NDArray[np.intp]]], Array]:
    """A function that measures loss increases of choices; each layer is rounded once for each scheme."""
    moments = dict(moments_needed(method, model, problem.layers, batches, loss_fn))
    schemes = tuple(parse_scheme(name) for name in problem.schemes)
    rounder = RoundingStore(method, moments)
    task = Task(model, batches, loss_fn, problem.layers, schemes, rounder, progress=progress)
    shares = batch_shares(task)
    reference = float(shares @ batch_losses(task))

    def one(choices: NDArray[np.intp]) -> float:
        allocation: Allocation = problem.allocation(choices)
        with ExitStack() as stack:
            for layer in problem.layers:
                stack.enter_context(in_scheme(task, layer, allocation.scheme_of[layer.name]))
            return float(shares @ batch_losses(task)) - reference

    return lambda every: np.array([one(choices) for choices in task.track(every, "measuring allocations")])


def _verdict(
    metric: str, predicted: Array, measured: Array, stratum: NDArray[np.intp], regrets: Array, generator: Any
) -> Verdict:
    members = [np.flatnonzero(stratum == k) for k in np.unique(stratum)]
    draws = [np.concatenate([generator.choice(group, len(group)) for group in members]) for _ in range(BOOTSTRAPS)]

    def interval(statistic: Callable[[Array, Array, NDArray[np.intp]], float], draws: Sequence[Any]) -> Interval:
        resampled = np.array([statistic(predicted[draw], measured[draw], stratum[draw]) for draw in draws])
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        return Interval(statistic(predicted, measured, stratum), float(low), float(high))

    return Verdict(
        metric,
        interval(lambda x, y, _: spearman(x, y), draws),
        interval(lambda x, y, _: float(kendalltau(x, y).statistic), draws[: BOOTSTRAPS // 4]),
        interval(at_fixed_size, draws),
        regrets,
    )


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation; 0 when one side is constant."""
    x, y = rankdata(first), rankdata(second)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def at_fixed_size(predicted: Array, measured: Array, stratum: NDArray[np.intp]) -> float:
    """Spearman's correlation within each budget, averaged, which excludes the effect of size."""
    return float(
        np.mean([spearman(predicted[stratum == k], measured[stratum == k]) for k in np.unique(stratum)])
    )  # fmt: skip


def facts_of(judgement: Judgement) -> tuple[tuple[str, Array, Array, NDArray[np.intp]], ...]:
    """Data of the figure: (metric, predicted, measured, budget index of each point), best metric first."""
    return tuple(
        (verdict.metric, judgement.predicted[verdict.metric], judgement.measured, judgement.stratum)
        for verdict in judgement.verdicts
    )


def plot_judgement(judgement: Judgement) -> Any:
    """Predicted against measured loss increases, one panel for each metric, one colour for each budget: a Figure."""
    from matplotlib.figure import Figure

    facts = facts_of(judgement)
    columns = min(4, len(facts))
    figure = Figure(figsize=(3.1 * columns, 2.9 * -(-len(facts) // columns)), layout="constrained")
    for number, (metric, predicted, measured, stratum) in enumerate(facts):
        axes = figure.add_subplot(-(-len(facts) // columns), columns, number + 1)
        for k, bits in enumerate(judgement.budgets):
            axes.plot(predicted[stratum == k], measured[stratum == k], ".", ms=4, label=f"{bits:g} bits")
        axes.set_title(f"{metric}: {judgement.verdicts[number].at_fixed_size.value:.2f} at fixed size", fontsize=9)
        axes.set_xlabel("predicted")
        axes.set_ylabel("measured loss increase")
        if (predicted > 0).all() and (measured > 0).all():
            axes.set_xscale("log")
            axes.set_yscale("log")
        if number == 0:
            axes.legend(fontsize=7)
    return figure
