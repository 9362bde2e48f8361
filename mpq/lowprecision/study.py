"""Studies of training in few bits: one task trained in several settings, with paired seeds.

After arXiv 2509.17791 (which settings cost how much) and arXiv 2405.18710 (which runs fail, and whether the sharpness
of the loss tells in advance).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, inf, isfinite, pi
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.lowprecision.convert import convert
from mpq.lowprecision.overhead import overhead
from mpq.lowprecision.products import AnyRecipe
from mpq.network.calibration import Batch, LossFn

OptimizerFactory: TypeAlias = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]  # parameters, rate


@dataclass(frozen=True)
class Task:
    """A training task: model, data and evaluation."""

    name: str
    build: Callable[[int], nn.Module]  # seed -> an untrained model
    batches: Callable[[int], Iterator[Batch]]  # seed -> endless training batches
    loss_fn: LossFn
    measure: Callable[[nn.Module], float]  # loss on unseen data
    rate: float
    exclude: tuple[str, ...] = ()  # layers that stay in full precision
    sharpness: Callable[[nn.Module], float] | None = None  # mean over unseen samples


def adamw(parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """AdamW with the usual settings of language models."""
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.05)


@dataclass(frozen=True)
class Setting:
    """A recipe, None for full precision, and an optimizer."""

    recipe: AnyRecipe | None = None
    optimizer: OptimizerFactory = adamw


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: str
    rate: float
    seed: int
    loss: float  # on unseen data; infinite where it is not finite
    losses: tuple[float, ...]  # loss of every step
    sharpness: tuple[tuple[int, float], ...] = ()  # step, mean


def train(
    task: Task, name: str, setting: Setting, *, steps: int, seed: int = 0, rate: float | None = None, looks: int = 6
) -> Run:
    """Train one model: warm-up of 20 steps, half a cosine, gradients clipped to a norm of 1; sharpness `looks` times.

    Training stops at a loss that is not finite.
    """
    rate = task.rate if rate is None else rate
    model, series = task.build(seed), []
    if setting.recipe is not None:
        convert(model, setting.recipe, exclude=task.exclude, seed=seed)
    optimizer, losses = setting.optimizer(model.parameters(), rate), []
    for step, batch in zip(range(steps), task.batches(seed), strict=False):
        factor = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + cos(pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = task.loss_fn(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if not isfinite(losses[-1]):
            break
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if task.sharpness is not None and step % max(steps // looks, 1) == 0:
            series.append((step, task.sharpness(model.eval())))
    measured = task.measure(model.eval())
    return Run(name, rate, seed, measured if isfinite(measured) else inf, tuple(losses), tuple(series))


def compare(
    task: Task,
    settings: Mapping[str, Setting],
    *,
    seeds: int,
    steps: int,
    rates: Sequence[float] = (),
    report: Callable[[Run], None] = lambda run: None,
) -> tuple[Run, ...]:
    """Train every setting with every rate (the task's own by default) and seed; `report` is called with each run."""
    runs = []
    for name, setting in settings.items():
        for rate in rates or (task.rate,):
            for seed in range(seeds):
                runs.append(train(task, name, setting, steps=steps, seed=seed, rate=rate))
                report(runs[-1])
    return tuple(runs)


def gaps(runs: Sequence[Run], base: str) -> dict[tuple[str, float], NDArray[np.float64]]:
    """Losses above those of the base setting, paired by seed, for each setting and rate.

    Raises:
        MpqError: the base setting was not run with a rate and seed.
    """
    known = {(run.rate, run.seed): run.loss for run in runs if run.setting == base}
    differences: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        if (run.rate, run.seed) not in known:
            raise MpqError(f"{base!r} was not run at rate {run.rate:g} with seed {run.seed}: nothing to compare with")
        differences.setdefault((run.setting, run.rate), []).append(run.loss - known[run.rate, run.seed])
    return {key: np.array(values) for key, values in differences.items()}


def mean_with_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error; NaN for a single value."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(values.mean()), error


@dataclass(frozen=True)
class EarlyWarning:
    """Quality of the sharpness halfway as a predictor of a run's end."""

    correlation: float  # Spearman, with the final loss above the base's
    auc: float  # chance that a failed run was sharper than one that did not fail; NaN where all or none failed
    interval: tuple[float, float]  # 95 %, by bootstrap over runs
    failed: int
    runs: int


def early_warning(runs: Sequence[Run], base: str, far: float, seed: int = 0) -> EarlyWarning:
    """Judge sharpness as a predictor of failure: a loss more than `far` above the base's, or not finite."""
    known = {(run.rate, run.seed): run.loss for run in runs if run.setting == base}
    usable = [run for run in runs if run.setting != base and len(run.sharpness) > 1]
    early = np.array([run.sharpness[len(run.sharpness) // 2][1] for run in usable])
    above = np.array([run.loss - known[run.rate, run.seed] for run in usable])
    failed = ~(above < far)

    def auc(index: NDArray[Any]) -> float:
        bad, good = early[index][failed[index]], early[index][~failed[index]]
        if not len(bad) or not len(good):
            return float("nan")
        return float(mannwhitneyu(bad, good).statistic / (len(bad) * len(good)))

    draws = np.random.default_rng(seed)
    bootstrap = np.array([auc(draws.integers(0, len(usable), len(usable))) for _ in range(500)])
    bootstrap = bootstrap[np.isfinite(bootstrap)]
    low, high = np.percentile(bootstrap, [2.5, 97.5]) if len(bootstrap) else (np.nan, np.nan)
    correlation = float(spearmanr(early, np.nan_to_num(above, posinf=1e9)).statistic)
    everything = auc(np.arange(len(usable)))
    return EarlyWarning(correlation, everything, (float(low), float(high)), int(failed.sum()), len(usable))


def added_share(task: Task, setting: Setting) -> float:
    """Operations that the setting's recipe adds, as a share of its products' (`overhead`); 0 in full precision."""
    if setting.recipe is None:
        return 0.0
    batch = next(task.batches(0))
    return overhead(task.build(0), setting.recipe, batch, task.loss_fn, exclude=task.exclude)
