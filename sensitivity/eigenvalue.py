"""Top eigenvalue of each layer's curvature (HAWQ, arXiv 1905.03696): the ranking lambda_i / n_i, the tuning order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, check_batches, evaluating, samples_in, seeded_normal
from mpq.network.prepare import prepared
from mpq.network.samples import arranged
from mpq.quantized import Moments, checked_layers
from mpq.rounding.store import Rounder, rounder_of
from mpq.sensitivity.lanczos import Lanczos
from mpq.sensitivity.products import operator_named, weight_curvature
from mpq.sensitivity.task import Scores, Task, score_weight_errors


def eigenvalue(
    task: Task,
    *,
    operator: str = "hessian",
    samples: int = 128,
    max_steps: int = 12,
    tolerance: float = 0.1,
    backend: str = "own",
) -> Scores:
    """Score 1/2 * lambda_i / n_i * ||Q(W_i) - W_i||^2 of every layer and scheme, lambda_i the top eigenvalue of H_ii.

    lambda_i / n_i is HAWQ's rank S_i (section 3.1). It is no prediction of the loss: an error rarely lies along the top
    eigenvector, and dividing by n_i only happens to give the scale of a mean eigenvalue. A top eigenvalue below its
    residual is replaced by it.

    Args:
        task: model, data, layers and schemes.
        operator, samples, max_steps, tolerance: see `top_eigenvalues`.
        backend: "own", or "pyhessian": its power iteration, one layer at a time, on the same samples.
    """
    eigenvalues = top_eigenvalues(
        task, operator=operator, samples=samples, max_steps=max_steps, tolerance=tolerance, backend=backend
    )
    values = np.maximum(eigenvalues.values, eigenvalues.residuals)
    index = {layer.name: i for i, layer in enumerate(task.layers)}

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        i = index[layer.name]
        factor = 0.5 * difference.square().sum(dtype=torch.float64).item() / layer.params
        return factor * float(values[i]), factor * float(eigenvalues.residuals[i])

    return score_weight_errors(task, score)


def fine_tuning_order(
    model: nn.Module,
    allocation: Allocation,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    method: str | Rounder = "mse",
    second_moments: Moments | None = None,
    *,
    samples: int = 128,
    seed: int = 0,
) -> tuple[str, ...]:
    """The allocation's layers by descending Omega_i = lambda_i * ||Q(W_i) - W_i||^2: HAWQ's order of tuning.

    lambda_i is the top eigenvalue of the layer's block of the Hessian (section 3.2), its residual where that is larger.

    Args:
        model, batches, loss_fn: as `mpq.sensitivity.profile.profile` takes them.
        allocation: layers and schemes.
        method, second_moments: how layers are rounded, as in `mpq.simulate`.
        samples: the first samples that eigenvalues are taken on.
        seed: of the start vectors.

    Raises:
        MpqError: a model that cannot be differentiated twice, or layers of another model.
    """
    model, rounder = prepared(model), rounder_of(method, second_moments)
    checked = checked_layers(model, allocation)
    with evaluating(model):
        data = arranged(model, check_batches(batches), loss_fn, warn=False)
        task = Task(
            model, data.batches, data.loss_fn, allocation.layers, (), rounder, seed,
            second=data.second, together=data.together,
        )  # fmt: skip
        tops = top_eigenvalues(task, samples=samples)
    values = np.maximum(tops.values, tops.residuals)
    omegas = {
        layer.name: float(value) * task.weight_error(layer, scheme).square().sum(dtype=torch.float64).item()
        for value, (layer, scheme) in zip(values, checked, strict=True)
    }
    return tuple(sorted(omegas, key=lambda name: -omegas[name]))


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalue of each layer's diagonal block."""

    values: NDArray[np.float64]  # (layers,)
    residuals: NDArray[np.float64]  # (layers,), ||H_ii v - lambda v||: an eigenvalue lies within
    products: int  # block products taken, all layers together


def top_eigenvalues(
    task: Task,
    *,
    operator: str = "hessian",
    samples: int = 128,
    max_steps: int = 12,
    tolerance: float = 0.1,
    backend: str = "own",
) -> Eigenvalues:
    """The largest eigenvalue of every layer's block of the Hessian, by Lanczos, all layers side by side.

    Blocks cannot share products as traces do, but they share the graph of the gradients, and a block's product walks it
    from that layer on only. Lanczos finds the end of the spectrum in far fewer products than power iteration, and its
    residual bounds the error, without an absolute epsilon.

    Args:
        task: model, data and layers.
        operator: "hessian" or "gauss-newton".
        samples: the first samples are used, this many; extreme eigenvalues of few samples lie above those of many.
        max_steps: products for each layer at most.
        tolerance: a layer is done when its residual is below this share of its eigenvalue. The error is smaller: of the
            order of the residual squared over the distance to the next eigenvalue.
        backend: "own" or "pyhessian".

    Raises:
        MpqError: an unknown operator or backend.
    """
    operator_named(operator)
    if backend not in ("own", "pyhessian"):
        raise MpqError(f"unknown backend {backend!r}: take 'own' or 'pyhessian'")
    task = replace(task, batches=tuple(_first(task, samples)))

    def work(layers: Sequence[Layer]) -> Iterator[list[float]]:
        own = replace(task, layers=tuple(layers))
        if backend == "pyhessian":
            from mpq.sensitivity.pyhessian import pyhessian_eigenvalues

            return pyhessian_eigenvalues(own, max_steps=max_steps, tolerance=tolerance)
        return _lanczos(own, operator, max_steps, tolerance)

    eigenvalues = task.numbers({f"top eigenvalue of {layer.name}": layer for layer in task.layers}, work)
    values, residuals, products = np.array(eigenvalues).T
    return Eigenvalues(values, residuals, int(products.sum()))


def _first(task: Task, samples: int) -> Iterator[Batch]:
    for index, batch in enumerate(task.batches):
        if samples > 0:
            yield task.few_samples(samples, index)
            samples -= samples_in(batch)


def _lanczos(task: Task, operator: str, max_steps: int, tolerance: float) -> Iterator[list[float]]:
    """Value, residual and number of products of every layer, side by side."""
    runs = [Lanczos(_start(task, layer)) for layer in task.layers]
    sizes = np.array([samples_in(batch) for batch in task.batches], dtype=np.float64)
    values, residuals = np.zeros(len(runs)), np.full(len(runs), np.inf)
    unfinished, products = list(range(len(runs))), np.zeros(len(runs))
    for step in task.track(range(max_steps), "top eigenvalues"):
        if not unfinished:
            break
        sums = {i: torch.zeros_like(runs[i].direction) for i in unfinished}
        for index, share in enumerate(sizes / sizes.sum()):
            with weight_curvature(task, index, operator) as (curvature, _):
                for i in unfinished:
                    sums[i] += float(share) * curvature.block(i, runs[i].direction)
        for i in unfinished:
            runs[i].take(sums[i])
            ritz, _, remainders = runs[i].ritz()
            values[i], residuals[i] = ritz[-1], remainders[-1]
        products[unfinished] += 1
        small = residuals <= tolerance * np.abs(values)
        unfinished = [i for i in unfinished if not (runs[i].exhausted or (small[i] and step > 0))]
    yield from np.stack([values, residuals, products], 1).tolist()


def _start(task: Task, layer: Layer) -> Tensor:
    weight: Tensor = task.module(layer).weight  # type: ignore[assignment]
    return seeded_normal(weight.shape, task.seed, "eigenvalue", layer.name).to(weight.device)
