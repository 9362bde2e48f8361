"""Collecting the statistics of a pretrained model, in evaluation mode."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.costs import weight_bytes
from mpq.core.errors import MpqError, nearest_names
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import (
    Batch,
    LossFn,
    check_batches,
    evaluating,
    mapped,
    outputs_of,
    samples_in,
    seeded,
    tensors_in,
)
from mpq.network.fingerprint import fingerprint, model_fingerprint
from mpq.network.layers import find_layers, weight_matrix
from mpq.network.macs import count_macs
from mpq.proxies.programs import INPUTS
from mpq.proxies.statistics import Numbers, Space, Statistics
from mpq.rounding.store import MethodRounder
from mpq.sensitivity.derivatives import layer_uses
from mpq.sensitivity.eigenvalue import top_eigenvalues
from mpq.sensitivity.fisher import fisher_diagonals
from mpq.sensitivity.graph import only_gradients_of
from mpq.sensitivity.hessian import floored, hessian_traces
from mpq.sensitivity.products import weight_curvature
from mpq.sensitivity.task import Task

SAMPLES = 4096  # elements of a layer's matrix that are kept, at most
SIDE = 64  # rows kept when there are more elements than that


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    schemes: Sequence[str],
    *,
    wanted: Iterable[str] = tuple(INPUTS),
    method: str = "mse",
    samples: int = SAMPLES,
    seed: int = 0,
    progress: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Statistics:
    """The statistics that formulas name, of every layer of a model; the model is left unchanged.

    Args:
        model: the pretrained network.
        batches: calibration data; activations and their similarity come from the first batch alone.
        loss_fn: the batch's mean loss per sample.
        schemes: weight formats.
        wanted: names of INPUTS; others are not computed.
        method: how weights are rounded for "error".
        samples: maximum elements kept of a layer's matrix, as random rows and columns; sums are scaled up.
        seed: of the rows and columns, and of the probes of "trace" and "eigenvalue".
        progress: show progress bars.
        cache: a .npz file that is read if it exists, and written otherwise.

    Raises:
        MpqError: bad data, unknown names, or a cache of another model, data or settings.
    """
    wanted = list(dict.fromkeys(wanted))
    for name in wanted:
        if name not in INPUTS:
            raise MpqError(f"unknown statistic {name!r}: {nearest_names(name, INPUTS)}")
    batches = check_batches(batches)
    parsed = tuple(parse_scheme(name) for name in schemes)
    settings = {
        "weights": model_fingerprint(model), "data": fingerprint(t for batch in batches for t in tensors_in(batch)),
        "schemes": [scheme.name for scheme in parsed], "method": method, "samples": samples, "seed": seed,
    }  # fmt: skip
    if cache is not None and Path(cache).exists():
        known = Statistics.load(cache)
        known.check(settings)
        if set(wanted) <= set(known.numbers):
            return known
    with evaluating(model):
        layers = count_macs(model, find_layers(model), batches[0], loss_fn)
        task = Task(model, batches, loss_fn, layers, parsed, MethodRounder(method), seed, progress=progress)
        statistics = collect(task, wanted, samples, settings)
    if cache is not None:
        statistics.save(cache)
    return statistics


def collect(task: Task, wanted: Sequence[str], samples: int, settings: Mapping[str, Any]) -> Statistics:
    """The wanted statistics of a task's layers; its model is in evaluation mode."""
    keep = _Keeper(task, samples)
    numbers: dict[str, Numbers] = {}
    seconds: dict[str, float] = {}
    for names, gather in GATHERERS.items():
        if not set(names) & set(wanted):
            continue
        start = time.perf_counter()
        features = gather(task, keep)
        for name in names:
            numbers[name] = features[name]
            seconds[name] = time.perf_counter() - start
    names = tuple(scheme.name for scheme in task.schemes)
    return Statistics(task.layers, names, keep.spaces, numbers, seconds, settings)


class _Keeper:
    """The rows and columns kept of each layer's matrices, and their spaces."""

    def __init__(self, task: Task, samples: int) -> None:
        self.seed, self.samples = task.seed, samples
        self.spaces: dict[str, Space] = {}
        self.indices: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.plan("weight", task.layers, [(layer.rows, layer.cols) for layer in task.layers])

    def plan(self, space: str, layers: Sequence[Layer], shapes: Sequence[tuple[int, int]]) -> None:
        """Choose rows and columns of matrices of these shapes."""
        self.indices[space] = [
            self._pick(shape, space, layer.name) for shape, layer in zip(shapes, layers, strict=True)
        ]
        kept = np.array([(len(rows), len(cols)) for rows, cols in self.indices[space]]).T
        self.spaces[space] = Space(kept[0], kept[1], *np.array(shapes, dtype=np.int64).T)

    def _pick(self, shape: tuple[int, int], *names: str) -> tuple[Tensor, Tensor]:
        rows, cols = shape
        if rows * cols > self.samples:
            rows = min(rows, max(SIDE, self.samples // cols), self.samples)
            cols = min(cols, self.samples // rows)
        generator = seeded(self.seed, "kept", *names)
        picked = [
            torch.arange(size) if kept == size else torch.randperm(size, generator=generator)[:kept].sort().values
            for size, kept in zip(shape, (rows, cols), strict=True)
        ]
        return picked[0], picked[1]

    def take(self, index: int, matrix: Tensor, space: str = "weight") -> NDArray[np.float32]:
        """The kept elements of layer `index`'s matrix, flat."""
        rows, cols = (chosen.to(matrix.device) for chosen in self.indices[space][index])
        kept: NDArray[np.float32] = matrix.detach()[rows][:, cols].float().cpu().numpy().reshape(-1)
        return kept

    def gather(self, matrices: Iterable[Tensor], space: str = "weight") -> Numbers:
        """The kept elements of all layers' matrices, (1, elements)."""
        return np.concatenate([self.take(i, matrix, space) for i, matrix in enumerate(matrices)])[None]


def _weight(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    return {"weight": keep.gather(weight_matrix(task.module(layer)) for layer in task.layers)}


def _errors(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    rows = [[] for _ in task.schemes]  # type: list[list[NDArray[np.float32]]]
    for index, layer in enumerate(task.track(task.layers, "rounding")):
        for row, scheme in zip(rows, task.schemes, strict=True):
            row.append(keep.take(index, task.weight_error(layer, scheme)))
    return {"error": np.stack([np.concatenate(row) for row in rows])}


def _gradients(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    weights = _weights(task)
    sums = [torch.zeros_like(weight) for weight in weights]
    with only_gradients_of(task.model, weights):
        for batch, share in zip(task.batches, _shares(task), strict=True):
            loss = task.loss_fn(task.model, batch)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += share * gradient
    return {"grad": keep.gather(_matrices(task, sums))}


def _virtual(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    """Gradient of the summed outputs on one sample whose numbers are all 1: tokens are then the token 1."""
    weights = _weights(task)
    ones = mapped(task.few_samples(1), torch.ones_like)
    with only_gradients_of(task.model, weights), outputs_of(task.model) as outputs:
        task.loss_fn(task.model, ones)
        if not outputs:
            raise MpqError("the virtual gradient needs a loss function that calls the model: this one does not")
        gradients = torch.autograd.grad(outputs[-1].sum(), weights, allow_unused=True, materialize_grads=True)
    return {"virtual": keep.gather(_matrices(task, gradients))}


def _fisher(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    diagonals, _ = fisher_diagonals(task)
    return {"fisher": keep.gather(diagonals[layer.name] for layer in task.layers)}


def _hessgrad(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    """H g with the batches' own gradients: half the gradient of ||g||^2, averaged over batches."""
    sums = [torch.zeros_like(weight) for weight in _weights(task)]
    for index, share in enumerate(_shares(task)):
        with weight_curvature(task, index) as (curvature, _):
            gradients = [gradient.detach() for gradient in curvature.gradients]  # type: ignore[union-attr]
            for total, product in zip(sums, curvature.product(gradients), strict=True):
                total += share * product
    return {"hessgrad": keep.gather(_matrices(task, sums))}


def _activations(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    """Outputs and their loss gradients, a row per sample of the first batch, and the similarity of layers' outputs."""
    outputs: list[list[Tensor]] = [[] for _ in task.layers]
    slopes: list[list[Tensor]] = [[] for _ in task.layers]
    for _, uses in layer_uses(task, 0):
        for index, layer in enumerate(task.layers):
            for use in uses[layer.name][:1]:
                with torch.no_grad():
                    output = use.module(use.inputs)
                outputs[index].append(output.detach())
                slopes[index].append(use.gradient)
    acts, gradients = [_by_sample(parts) for parts in outputs], [_by_sample(parts) for parts in slopes]
    keep.plan("activation", task.layers, [(act.shape[0], act.shape[1]) for act in acts])
    return {
        "act": keep.gather(acts, "activation"), "actgrad": keep.gather(gradients, "activation"),
        "similarity": _similarities(acts)[None],
    }  # fmt: skip


def _by_sample(parts: Sequence[Tensor]) -> Tensor:
    """(samples, numbers); one row if samples had different numbers of positions, a zero without any."""
    if not parts:
        return torch.zeros(1, 1, dtype=torch.float32)
    flat = [part.flatten(1) if part.ndim > 1 else part.reshape(1, -1) for part in parts]
    if len({part.shape[1] for part in flat}) == 1:
        return torch.cat(flat)
    return torch.cat([part.reshape(1, -1) for part in flat], 1)


def _similarities(acts: Sequence[Tensor]) -> NDArray[np.float64]:
    """Sum over other layers of linear CKA (OMPQ, arXiv 2109.07865, equation 7), (layers,); NaN without samples."""
    grams = []
    for act in acts:
        centred = act.double() - act.double().mean(0, keepdim=True)
        grams.append(centred @ centred.mT)
    if len({len(gram) for gram in grams}) > 1 or len(grams[0]) < 2:
        return np.full(len(acts), np.nan)
    flat = torch.stack([gram.flatten() / gram.norm() for gram in grams])
    similar: NDArray[np.float64] = (flat @ flat.mT).sum(1).cpu().numpy() - 1
    return similar


def _trace(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    return {"trace": floored(hessian_traces(task))[None]}


def _eigenvalue(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    eigenvalues = top_eigenvalues(task)
    return {"eigenvalue": np.maximum(eigenvalues.values, eigenvalues.residuals)[None]}


def _costs(task: Task, keep: _Keeper) -> dict[str, Numbers]:
    layers, schemes = task.layers, task.schemes
    stored = [[weight_bytes(scheme, layer.rows, layer.cols) for layer in layers] for scheme in schemes]
    return {
        "bits": np.array([[scheme.weight.grid.bits] * len(layers) for scheme in schemes], dtype=np.float64),
        "bytes": np.array(stored, dtype=np.float64),
        "params": np.array([[layer.params for layer in layers]], dtype=np.float64),
        "macs": np.array([[layer.macs for layer in layers]], dtype=np.float64),
    }


def _weights(task: Task) -> list[Tensor]:
    return [task.module(layer).weight for layer in task.layers]  # type: ignore[misc]


def _matrices(task: Task, weights: Sequence[Tensor]) -> Iterable[Tensor]:
    """Tensors in the weights' shapes as matrices (rows, cols)."""
    for layer, weight in zip(task.layers, weights, strict=True):
        yield weight.t() if layer.kind == "transformers-conv1d" else weight.flatten(1)


def _shares(task: Task) -> list[float]:
    sizes = [samples_in(batch) for batch in task.batches]
    return [size / sum(sizes) for size in sizes]


GATHERERS: dict[tuple[str, ...], Callable[[Task, _Keeper], dict[str, Numbers]]] = {
    ("bits", "bytes", "params", "macs"): _costs,
    ("weight",): _weight,
    ("error",): _errors,
    ("grad",): _gradients,
    ("virtual",): _virtual,
    ("fisher",): _fisher,
    ("hessgrad",): _hessgrad,
    ("act", "actgrad", "similarity"): _activations,
    ("trace",): _trace,
    ("eigenvalue",): _eigenvalue,
}
