"""Pairwise interactions (CLADO): the loss of two layers beyond the sum of their own, for a quadratic program."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.interactions import Interactions
from mpq.core.scheme import Scheme, parse_scheme
from mpq.network.calibration import Batch, LossFn, check_batches, evaluating, mean_loss, outputs_of, samples_in
from mpq.network.layers import find_layers
from mpq.network.prepare import prepared
from mpq.rounding.store import RoundingStore, moments_needed
from mpq.sensitivity.loss import batch_losses, batch_shares, in_scheme
from mpq.sensitivity.predictions import classes_last, predictions
from mpq.sensitivity.task import Task

WAYS = ("outputs", "measured")


def interactions(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    schemes: Sequence[str | Scheme],
    *,
    way: str = "outputs",
    method: str = "mse",
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    progress: bool = True,
) -> Interactions:
    """Loss increases of single layers, measured, and of pairs of layers beyond them.

    "measured" takes L(i and j) - L(i) - L(j) + L for every pair of layers and schemes (CLADO, arXiv 2307.05657):
    (layers * schemes)^2 / 2 forward passes over the data. "outputs" takes the change of the logits when one layer is
    quantized, z_i, which the single losses need anyway, and for each pair E[z_i^T B z_j] with the loss's Hessian B in
    the logits: the cross term of the second order, from layers * schemes passes, for cross-entropy. Each layer is
    rounded once for each scheme, and kept.

    Args:
        model: as in `profile`, like the other arguments.
        batches: calibration data.
        loss_fn: the batch's mean loss per sample.
        schemes: candidates.
        way: "outputs" or "measured".
        method: rounding method.
        include: patterns of the layers to measure.
        exclude: patterns of layers to leave out.
        progress: show progress bars.

    Raises:
        MpqError: an unknown way, NaN data, or a loss other than cross-entropy with the way "outputs".
    """
    if way not in WAYS:
        raise MpqError(f"unknown way {way!r}: expected {' or '.join(WAYS)}")
    model, batches = prepared(model), check_batches(batches)
    layers = find_layers(model, include, exclude)
    parsed = tuple(parse_scheme(scheme) if isinstance(scheme, str) else scheme for scheme in schemes)
    with evaluating(model):
        reference = mean_loss(model, batches, loss_fn)
        moments = dict(moments_needed(method, model, layers, batches, loss_fn))
        task = Task(model, batches, loss_fn, layers, parsed, RoundingStore(method, moments), progress=progress)
        losses, pairs = (_from_outputs if way == "outputs" else _measured)(task)
    provenance: dict[str, Any] = {
        "way": way, "method": method, "reference_loss": reference,
        "nsamples": sum(samples_in(batch) for batch in batches),
    }  # fmt: skip
    names = tuple(scheme.name for scheme in parsed)
    return Interactions(tuple(layer.name for layer in layers), names, losses, pairs, provenance)


Arrays = tuple[NDArray[np.float64], NDArray[np.float64]]


def _measured(task: Task) -> Arrays:
    shape = (len(task.layers), len(task.schemes))
    shares = batch_shares(task)
    reference = float(shares @ batch_losses(task))
    losses, pairs = np.zeros(shape), np.zeros(shape + shape)
    for i, a in np.ndindex(shape):
        with in_scheme(task, task.layers[i], task.schemes[a]):
            losses[i, a] = float(shares @ batch_losses(task)) - reference
    couples = [(one, other) for one, other in combinations(np.ndindex(shape), 2) if one[0] != other[0]]
    for (i, a), (j, b) in task.track(couples, "pairs"):
        with in_scheme(task, task.layers[i], task.schemes[a]), in_scheme(task, task.layers[j], task.schemes[b]):
            both = float(shares @ batch_losses(task)) - reference
        pairs[i, a, j, b] = pairs[j, b, i, a] = both - losses[i, a] - losses[j, b]
    return losses, pairs


@torch.no_grad()
def _from_outputs(task: Task) -> Arrays:
    shape = (len(task.layers), len(task.schemes))
    losses, products = np.zeros(shape), np.zeros((shape[0] * shape[1],) * 2)
    shares = batch_shares(task)
    for index in task.track(range(len(task.batches)), "changes of logits"):
        asked = predictions(task.model, task.batches[index], task.loss_fn)
        reference, before = _run(task, index)
        changes = []
        for i, a in np.ndindex(shape):
            with in_scheme(task, task.layers[i], task.schemes[a]):
                quantized_loss, after = _run(task, index)
            losses[i, a] += shares[index] * (quantized_loss - reference)
            parts = [_rooted(new - old, old, part.weights) for new, old, part in zip(after, before, asked, strict=True)]
            changes.append(torch.cat(parts))
        stacked = torch.stack(changes)
        products += shares[index] * (stacked @ stacked.T).double().cpu().numpy()
    pairs = ((products + products.T) / 2).reshape(shape + shape)
    for i in range(shape[0]):
        pairs[i, :, i] = 0
    return losses, pairs


def _run(task: Task, index: int) -> tuple[float, list[Tensor]]:
    with outputs_of(task.model) as outputs:
        loss = task.loss_fn(task.model, task.batches[index])
    return loss.item(), [output.float() for output in outputs]


def _rooted(change: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """B^(1/2) z, flat: u . u' = w (z^T diag(p) z' - (p . z) (p . z')), the covariance of z and z' under p."""
    change, logits = classes_last(change, weights), classes_last(logits, weights)
    chances = logits.softmax(-1)
    centred = change - (chances * change).sum(-1, keepdim=True)
    return (weights.float().sqrt().unsqueeze(-1) * chances.sqrt() * centred).flatten()
