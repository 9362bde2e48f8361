"""HIGGS' linearity (arXiv 2411.17525): the loss rises with each layer's relative squared error, at a measured slope."""

import numpy as np
import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.network.calibration import seeded_normal
from mpq.network.layers import weight_matrix
from mpq.sensitivity.loss import ByBatch, batch_losses, batch_shares, mean_and_error, with_weight
from mpq.sensitivity.task import Scores, Task, score_weight_errors


def linearity(task: Task, *, noise: float = 0.1, draws: int = 1) -> Scores:
    """Predicted loss increase a_i * ||Q(W_i) - W_i||^2 / ||W_i||^2 of every layer i and scheme.

    The linearity theorem (section 3) makes the loss's expected rise linear in the layers' relative squared errors t^2.
    The slope a_i is measured with normal noise of one relative size: of +E and -E the mean is taken, which leaves no
    first-order term. Costs 2 * draws forward passes over all batches for each layer, whatever the number of formats. A
    slope below its standard error, over batches and draws, is replaced by it.

    Args:
        task: model, data, layers and schemes.
        noise: t, the noise's norm over the weight's; the same as that of the formats of interest does best.
        draws: noise matrices for each layer.
    """
    if noise <= 0 or draws < 1:
        raise MpqError(
            f"invalid options of linearity: expected noise above 0 and at least one draw, not {noise} and {draws}"
        )
    reference, shares = batch_losses(task), batch_shares(task)
    numbers = task.numbers(
        {f"slope of {layer.name}": layer for layer in task.layers},
        lambda layers: (_slope(task, layer, reference, shares, noise, draws) for layer in task.track(layers, "noise")),
    )
    slopes = {layer.name: (slope, error) for layer, (slope, error) in zip(task.layers, numbers, strict=True)}

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        norm = weight_matrix(task.module(layer)).detach().float().square().sum(dtype=torch.float64).item()
        relative = difference.square().sum(dtype=torch.float64).item() / norm if norm > 0 else 0.0
        slope, error = slopes[layer.name]
        return max(slope, error) * relative, error * relative

    return score_weight_errors(task, score)


def _slope(
    task: Task, layer: Layer, reference: ByBatch, shares: ByBatch, noise: float, draws: int
) -> tuple[float, float]:  # fmt: skip
    weight = weight_matrix(task.module(layer)).detach().float()
    changes = []
    for draw in range(draws):
        normal = seeded_normal(weight.shape, task.seed, "noise", layer.name, draw).to(weight.device)
        shift = normal * (noise * weight.norm() / normal.norm())
        both = np.zeros_like(reference)
        for sign in (1, -1):
            with with_weight(task, layer, weight + sign * shift):
                both += (batch_losses(task) - reference) / 2
        changes.append(both / noise**2)
    return mean_and_error(np.mean(changes, axis=0), shares)
