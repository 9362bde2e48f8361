"""Evolution on measured loss, by Optuna: many workers, several fidelities, no allocation measured twice."""

import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, nearest_names
from mpq.core.frontier import MEASURED_COLUMN, Frontier, non_dominated
from mpq.core.problem import Problem
from mpq.search.exact import exact
from mpq.search.integer import integer
from mpq.search.levels import Levels, LevelSpace, level_space
from mpq.search.trials import (
    DROPPED,
    DUPLICATE,
    ERROR,
    KEY,
    LOST,
    MEASURED,
    NO_NUMBER,
    OUTCOME,
    START,
    TAKEN_FOR_DEAD,
    Watch,
    alive,
    claim,
    enqueue,
    open_study,
    retry,
    settle,
    settled,
    spent,
    trials_of,
)

log = logging.getLogger(__name__)

# Measured loss of an allocation on this share of the data, alone or with its standard error.
Evaluate = Callable[[Allocation, float], float | tuple[float, float]]
PARENTS = 4  # parent-pool size
BROOD = 4  # candidates per child; the one of least predicted loss is measured
SURVIVORS = 50.0  # percentage of the trials promoted to the next share of the data
STARTUP = 6  # trials measured in full before any is dropped
GIVE_UP = 20  # consecutive duplicates after which the search ends

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {  # besides "switch", the level-switch mutation; seed -> sampler
    "nsga2": lambda seed: NSGAIISampler(population_size=16, seed=seed),
    "nsga3": lambda seed: _nsga3(seed),
    "tpe": lambda seed: TPESampler(multivariate=True, n_startup_trials=8, seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


def _nsga3(seed: int) -> BaseSampler:
    with warnings.catch_warnings():  # Optuna's warning that it is experimental
        warnings.simplefilter("ignore")
        return NSGAIIISampler(population_size=16, seed=seed)


@dataclass(frozen=True)
class Evaluation:
    """An allocation that was measured on all the data."""

    choices: tuple[int, ...]  # scheme index per group
    predicted: float
    measured: float
    error: float = math.nan  # standard error of the measured loss; NaN where it is not known


@dataclass(frozen=True, eq=False, repr=False)
class MeasuredFrontier(Frontier):
    """A frontier of measured losses; allocations have the predicted loss, and the measured one in provenance."""

    # `gap` is NaN: there is no bound for allocations that were not measured.
    evaluations: tuple[Evaluation, ...] = ()  # all, in order of their start
    failures: int = 0  # evaluations without a finite number
    dropped: int = 0  # allocations dropped after a part of the data
    errors: tuple[float, ...] = ()  # (points,), standard errors of the measured losses

    def extra_columns(self, index: int) -> dict[str, float]:
        """Extra CSV columns of a point: predicted loss, measured loss and its standard error."""
        return {
            "loss": super().extra_columns(index)["loss"], MEASURED_COLUMN: float(self.losses[index]),
            "error": self.errors[index] if self.errors else math.nan,
        }  # fmt: skip

    def allocation(self, index: int) -> Allocation:
        """The allocation of a point."""
        allocation = super().allocation(index)
        provenance = {**allocation.provenance, "search": "evolution", "measured_loss": float(self.losses[index])}
        return replace(allocation, provenance=provenance)


def evolution(
    problem: Problem,
    *,
    evaluate: Evaluate,
    trials: int = 100,
    cost: str = "size",
    sampler: str | None = None,
    shares: Sequence[float] = (1.0,),
    starts: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    study: str = "mpq",
    seed: int = 0,
    heartbeat: float = 10.0,
    resume: bool = False,
) -> MeasuredFrontier:
    """Search for allocations of lower measured loss than the predicted optima.

    With budgets it minimizes the loss within them, starting from the exact frontier's points, so the result is never
    worse than these. Without any it minimizes loss and cost together, starting from points along the exact frontier,
    and returns a frontier of measured points.

    With the same storage, study and seed an interrupted run is resumed, with the result of an uninterrupted one, and
    several processes share the work. If a worker dies, another one repeats its running evaluation.

    Args:
        problem: every allocation that is measured meets all its budgets, if there are any.
        evaluate: `evaluate(allocation, share)`, the loss on the first `share` of the data, lower is better, or the loss
            and its standard error, which is only reported. Plots show it beside predicted loss increases, so it should
            be an increase too.
        trials: total number of evaluations, by all workers and earlier runs, including those on a part of the data;
            workers that start the last one at the same time add one each.
        cost: the cost of the frontier that is returned.
        sampler: "switch" (the default under budgets), the level-switch mutation of EvoPress (arXiv 2410.14649), or
            Optuna's "nsga2" (the default without budgets), "nsga3", "tpe" or "random", whose proposals are lowered
            until they meet the budgets.
        shares: rising shares of the data, the last one 1; after each but the last the worse half is dropped. Only with
            budgets, since two objectives do not order allocations.
        starts: points of the exact frontier to start from; by default 4 within the budgets, or 12 without budgets.
        storage: a journal file, a database's URL, or None for memory.
        study: name in the storage.
        seed: of all random numbers.
        heartbeat: seconds between heartbeats; a worker that misses eight is considered dead.
        resume: require an existing study, and first wait until its dead workers are known, so that the results equal
            those of an uninterrupted run even after a worker was killed.

    Raises:
        MpqError: unreachable budgets, unknown names, a study of another problem, none to resume, or only failed
            evaluations.
    """
    sampler = sampler or ("switch" if problem.budgets else "nsga2")
    if sampler != "switch" and sampler not in SAMPLERS:
        raise MpqError(f"unknown sampler {sampler!r}: {nearest_names(sampler, ['switch', *SAMPLERS])}")
    if not shares or shares[-1] != 1 or shares[0] <= 0 or any(b <= a for a, b in pairwise(shares)):
        raise MpqError(
            f"invalid shares of the data {', '.join(map(str, shares))}: expected rising ones that end with 1"
        )
    if not problem.budgets and (sampler == "switch" or len(shares) > 1):
        raise MpqError("level switches and shares of the data need at least one budget, such as size")
    starts = starts or (4 if problem.budgets else 12)
    space = level_space(problem, cost)
    points = _starts(problem, cost, starts)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = _settings(problem, sampler, shares, starts, seed)
    opened = open_study(storage, study, settings, objectives=1 if problem.budgets else 2, resume=resume)
    opened.pruner = NopPruner() if len(shares) == 1 else PercentilePruner(SURVIVORS, n_startup_trials=STARTUP)
    worker = _Worker(opened, space, evaluate, tuple(shares), sampler, seed, heartbeat)
    if resume:
        Watch(opened, heartbeat).wait_for_signs()
    worker.run(trials, [space.levels(choices) for choices in points])
    return _frontier(opened, space, cost)


class _Worker:
    """One process of a study."""

    def __init__(
        self, study: optuna.Study, space: LevelSpace, evaluate: Evaluate, shares: tuple[float, ...],
        sampler: str, seed: int, heartbeat: float,
    ) -> None:  # fmt: skip
        self.study, self.space, self.evaluate, self.shares = study, space, evaluate, shares
        self.sampler, self.seed, self.heartbeat = sampler, seed, heartbeat
        self.watch = Watch(study, heartbeat)
        self.distributions: dict[str, BaseDistribution] = {
            _name(group): IntDistribution(0, int(size) - 1) for group, size in enumerate(space.sizes)
        }

    def run(self, trials: int, starts: Sequence[Levels]) -> None:
        """Run until the number of evaluations is reached, starting points first, or nothing new is found."""
        duplicates = 0
        while duplicates < GIVE_UP:
            self.watch.retire_dead()
            known = trials_of(self.study)
            made = spent(known)
            if made >= trials:
                return
            if made + sum(trial.state is TrialState.RUNNING for trial in known) >= trials:
                time.sleep(self.heartbeat / 2)  # other workers run the last trials, and may die
                continue
            # A new sampler for each trial depends on the known trials, not on how often a run was interrupted.
            self.study.sampler = self._sampler(known)
            self._queue_start(known, starts)
            trial = self.study.ask(self.distributions)
            try:
                with alive(trial, self.heartbeat):
                    duplicates = 0 if self._measure(trial) else duplicates + 1
            except UpdateFinishedTrialError:
                log.warning(TAKEN_FOR_DEAD, trial.number)
            except BaseException:  # an interrupt above all: the evaluation is done again when the search goes on
                retry(self.study, trial._get_latest_trial())
                raise
        log.warning("the search ended early: the last %d proposals had all been measured before", GIVE_UP)

    def _queue_start(self, known: list[FrozenTrial], starts: Sequence[Levels]) -> None:
        """Queue a starting point that no worker has begun; lost trials in the queue go first."""
        if any(trial.state is TrialState.WAITING for trial in known):
            return
        begun = {trial.user_attrs.get(KEY) for trial in known if trial.user_attrs.get(OUTCOME) != LOST}
        remaining = [levels for levels in starts if _key(levels) not in begun]
        if remaining:
            # The first generation of a genetic sampler: without this mark it would never be among the parents.
            genetic = isinstance(self.study.sampler, (NSGAIISampler, NSGAIIISampler))
            marks = {f"{type(self.study.sampler).__name__}:generation": 0} if genetic else {}
            enqueue(self.study, {_name(g): int(level) for g, level in enumerate(remaining[0])}, {START: True}, marks)

    def _measure(self, trial: Trial) -> bool:
        """Measure and end a trial; return whether it was new."""
        levels = self.space.repaired(np.array([trial.params[name] for name in self.distributions], np.intp))
        other = claim(self.study, trial, _key(levels), self.watch)
        if other is not None:
            settle(self.study, trial, DUPLICATE, other.values if other.state is TrialState.COMPLETE else None)
            return False
        choices = self.space.choices(levels)
        allocation = self.space.problem.allocation(choices)
        loss, error = math.nan, math.nan
        for rung, share in enumerate(self.shares):
            answer = self.evaluate(allocation, share)
            loss, error = map(float, answer if isinstance(answer, tuple) else (answer, math.nan))
            if not math.isfinite(loss) or share == 1:
                break
            trial.report(loss, rung)
            if START not in trial.user_attrs and trial.should_prune():
                settle(self.study, trial, DROPPED)
                return True
        if math.isfinite(error):
            trial.set_user_attr(ERROR, error)
        if not math.isfinite(loss):
            settle(self.study, trial, NO_NUMBER)
        elif len(self.study.directions) == 1:
            settle(self.study, trial, MEASURED, [loss])
        else:
            settle(self.study, trial, MEASURED, [loss, self.space.problem.totals(choices)[self.space.cost]])
        return True

    def _sampler(self, known: list[FrozenTrial]) -> BaseSampler:
        digest = hashlib.sha256(f"{self.seed}/evolution/{len(settled(known))}".encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        if self.sampler == "switch":
            return _SwitchSampler(self.space, self.distributions, number)
        return SAMPLERS[self.sampler](number)


class _SwitchSampler(BaseSampler):
    """Children of the best trials by level switches."""

    def __init__(self, space: LevelSpace, distributions: dict[str, BaseDistribution], seed: int) -> None:
        self.space, self.distributions, self.random = space, distributions, np.random.default_rng(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = trials_of(study)
        best = sorted((other for other in known if _measured(other)), key=lambda t: (t.value, t.user_attrs[KEY]))
        parents = [_levels(other.user_attrs[KEY]) for other in best[:PARENTS]]
        if not parents:  # no measurements yet: other workers are measuring the starting points, or these failed
            parents = [self.space.repaired(self.space.sizes - 1)]
        seen = {other.user_attrs.get(KEY) for other in known}
        child = self.space.child(parents, self.random, lambda levels: _key(levels) not in seen, BROOD)
        levels = parents[0] if child is None else child
        return {_name(group): int(level) for group, level in enumerate(levels)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise NotImplementedError("all groups are sampled together")


def _starts(problem: Problem, cost: str, number: int) -> list[NDArray[Any]]:
    """The optimum within the budgets and the exact frontier's points below it; without budgets, points all along it."""
    if not problem.budgets:
        whole = exact(problem, cost=cost).choices
        return [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, number).round().astype(int)).tolist()]
    if set(problem.budgets) == {cost}:
        return [*exact(problem, cost=cost).choices[-number:]][::-1]
    return [*integer(problem, cost=cost).choices]


def _frontier(study: optuna.Study, space: LevelSpace, cost: str) -> MeasuredFrontier:
    problem, known = space.problem, trials_of(study)
    outcomes = [trial.user_attrs[OUTCOME] for trial in settled(known)]
    failures = outcomes.count(NO_NUMBER)
    if failures:
        log.warning("%d of %d evaluations did not return a finite number and were left out", failures, spent(known))
    measured = []
    for trial in known:
        if _measured(trial):
            levels = _levels(trial.user_attrs[KEY])
            choices = tuple(space.choices(levels).tolist())
            error = trial.user_attrs.get(ERROR, math.nan)
            measured.append(Evaluation(choices, space.loss(levels), trial.values[0], error))
    if not measured:
        raise MpqError(f"none of {spent(known)} evaluations returned a finite number: check the model and the data")
    costs = np.array([problem.totals(one.choices)[cost] for one in measured])
    losses = np.array([one.measured for one in measured])
    kept = non_dominated(costs, losses)
    return MeasuredFrontier(
        problem, costs[kept], losses[kept], [np.array(measured[i].choices) for i in kept.tolist()], cost,
        math.nan, tuple(measured), failures, outcomes.count(DROPPED), tuple(measured[i].error for i in kept.tolist()),
    )  # fmt: skip


def _settings(problem: Problem, sampler: str, shares: Sequence[float], starts: int, seed: int) -> str:
    digest = hashlib.sha256(problem.losses.tobytes())
    for name in sorted(problem.costs):
        digest.update(problem.costs[name].tobytes())
    names = [layer.name for layer in problem.layers]
    settings = [names, problem.schemes, dict(problem.budgets), sampler, list(shares), starts, seed, digest.hexdigest()]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _measured(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and trial.user_attrs.get(OUTCOME) == MEASURED


def _name(group: int) -> str:
    return f"group{group}"


def _key(levels: Levels) -> str:
    return " ".join(map(str, levels.tolist()))


def _levels(key: str) -> Levels:
    return np.array(key.split(), dtype=np.intp)
