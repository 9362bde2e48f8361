"""The whole spectrum of the loss's curvature by stochastic Lanczos quadrature."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, check_batches, evaluating, samples_in, seeded_normal
from mpq.network.layers import find_layers
from mpq.network.parallel import share, total
from mpq.network.prepare import prepared
from mpq.rounding.store import MethodRounder
from mpq.sensitivity.lanczos import Lanczos
from mpq.sensitivity.products import operator_named, weight_curvature
from mpq.sensitivity.task import Task

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of an operator as a few weighted nodes, one row for each random start."""

    nodes: Array  # (runs, steps), Ritz values, ascending; a run that ended early is padded with its last
    weights: Array  # (runs, steps), shares of eigenvalues there, sum 1
    residuals: Array  # (runs, steps), an eigenvalue lies within of each node
    size: int  # number of eigenvalues: of weights

    def trace(self, function: Callable[[Array], Array] = lambda values: values) -> tuple[float, float]:
        """Estimate of tr f(H), and its standard error over runs (NaN for one run).

        Gauss' quadrature: size * mean over runs of sum_k weights_k f(nodes_k), exact in each run for polynomials of
        degree up to 2 * steps - 1 (Golub and Meurant; Ubaru, Chen and Saad 2017).
        """
        by_run = self.size * (self.weights * function(self.nodes)).sum(1)
        count = len(by_run)
        return float(by_run.mean()), float(by_run.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")

    def density(self, values: Array, width: float | None = None) -> Array:
        """Share of eigenvalues per unit at these values, each node a normal bell of this standard deviation.

        By default pyhessian's width: variance 1e-5 times the spectrum's range, or 1e-5 when that is below 1.
        """
        if width is None:
            width = float(np.sqrt(1e-5 * max(1.0, np.ptp(self.nodes))))
        bells = np.exp(-0.5 * ((values[:, None, None] - self.nodes) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return np.asarray((bells * self.weights).sum(-1).mean(-1))

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue found."""
        return float(self.nodes.min()), float(self.nodes.max())


def spectrum(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    operator: str = "hessian",
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    steps: int = 60,
    runs: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Spectrum:
    """The spectrum of the curvature of the loss per sample, over the weights of all layers together.

    Each run takes `steps` products over all batches from a random unit vector; the basis, kept orthogonal throughout,
    takes steps * weights * 4 bytes.

    Args:
        model: as in `mpq.sensitivity.profile.profile`.
        batches: calibration data.
        loss_fn: the batch's mean loss per sample.
        operator: "hessian" or "gauss-newton".
        include: patterns of the layers.
        exclude: patterns of layers to leave out.
        steps: Lanczos steps of a run.
        runs: random starts.
        seed: of the starts.
        progress: show progress bars.

    Raises:
        MpqError: no steps or runs, NaN data, or a model that cannot be differentiated twice.
    """
    operator_named(operator)
    if steps < 1 or runs < 1:
        raise MpqError(f"invalid spectrum: expected at least one step and one run, not {steps} and {runs}")
    model = prepared(model)
    with evaluating(model):
        layers = find_layers(model, include, exclude)
        task = Task(
            model, check_batches(batches), loss_fn, layers, (), MethodRounder("nearest"), seed, progress=progress
        )
        size = sum(layer.params for layer in layers)
        spectra = [_run(task, operator, min(steps, size), run, size) for run in range(runs)]
    longest = max(len(nodes) for nodes, _, _ in spectra)
    padded = [
        (
            np.pad(nodes, (0, longest - len(nodes)), mode="edge"),
            np.pad(weights, (0, longest - len(weights))),
            np.pad(residuals, (0, longest - len(residuals))),
        )
        for nodes, weights, residuals in spectra
    ]
    nodes, weights, residuals = (np.stack(rows) for rows in zip(*padded, strict=True))
    return Spectrum(nodes, weights, residuals, size)


def _run(task: Task, operator: str, steps: int, run: int, size: int) -> tuple[Array, Array, Array]:
    device = next(task.model.parameters()).device
    lanczos = Lanczos(seeded_normal(size, task.seed, "spectrum", run).to(device))
    for _ in task.track(range(steps), f"spectrum, run {run + 1}"):
        if lanczos.exhausted:
            break
        lanczos.take(_product(task, operator, lanczos.direction))
    return lanczos.ritz()


def _product(task: Task, operator: str, vector: Tensor) -> Tensor:
    """H v over all batches, flat."""
    parts = torch.split(vector, [layer.params for layer in task.layers])
    added, samples = torch.zeros_like(vector), sum(samples_in(batch) for batch in task.batches)
    for index, batch in share(list(enumerate(task.batches))):
        with weight_curvature(task, index, operator) as (curvature, _):
            shaped = [part.view_as(weight) for part, weight in zip(parts, curvature.variables, strict=True)]
            product = torch.cat([tensor.float().flatten() for tensor in curvature.product(shaped)])
        added += product * (samples_in(batch) / samples)
    return total({"product": added})["product"]
