"""Traces of Gauss-Newton's blocks from gradients of single samples, and the layers where the Hessian's are the same."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.network.calibration import outputs_of, samples_in, seeded_normal, tensors_in
from mpq.sensitivity.derivatives import Use, Uses, designed_uses
from mpq.sensitivity.graph import differentiable_twice, only_gradients_of
from mpq.sensitivity.predictions import predictions
from mpq.sensitivity.products import Hessian
from mpq.sensitivity.task import Task

TOGETHER = 4  # draws whose gradients are held at once: a layer's inputs are unfolded once for them
LARGEST = 2**16  # logits of a sample in a design
TRIED = 4  # evenly spaced layers, one of which must be straight for all to be checked


def gauss_newton_draws(task: Task, order: int | None, index: int, draws: Sequence[int]) -> Iterator[list[float]]:
    """Mean over batch `index` of ||J_i^T d||^2 for every layer i, d random slopes of a sample's own loss: of each draw.

    Its mean over d is Tr(J_i^T B J_i), the trace of layer i's block of Gauss-Newton's matrix. Its variance is the mean
    over samples, divided by their number, of 2 (||K||_F^2 - sum of squares of K's diagonal), K = R^T J J^T R with
    B = R R^T, of a sample's logits: other layers and products of different samples add nothing. As many draws as the
    design's `order`, see `designed_uses`, give the trace exactly.

    Raises:
        MpqError: a loss other than cross-entropy, or NaN.
    """
    for start in range(0, len(draws), TOGETHER):
        some = draws[start : start + TOGETHER]
        sums = torch.zeros(len(some), len(task.layers), dtype=torch.float64)
        for samples, uses in designed_uses(task, index, some, order):
            for i, layer in enumerate(task.layers):
                sums[:, i] += _squares(layer, uses, samples)
        yield from (sums / samples_in(task.batches[index])).tolist()


def _squares(layer: Layer, draws: Sequence[Uses], samples: int) -> Tensor:
    """Sum over samples of the squared norm of the layer's gradient, of each draw (draws,)."""
    calls = [uses[layer.name] for uses in draws]  # calls with the same inputs
    if not calls[0]:
        return torch.zeros(len(draws), dtype=torch.float32)
    if any(isinstance(use.module, nn.Embedding) for use in calls[0]):
        return torch.stack([_looked_up(layer, uses, samples) for uses in calls])
    inputs = torch.cat([use.rows(samples)[0] for use in calls[0]], 2)  # (samples, groups, positions, cols)
    sums = []
    for uses in calls:
        slopes = torch.cat([use.slope_rows(samples) for use in uses], 2)
        positions, cols, rows = *inputs.shape[2:], slopes.shape[3]
        if positions * (rows + cols) < rows * cols:
            squares = (inputs @ inputs.mT) * (slopes @ slopes.mT)
        else:
            squares = (slopes.mT @ inputs).square()
        sums.append(squares.sum(dtype=torch.float64).cpu())
    return torch.stack(sums)


def _looked_up(layer: Layer, uses: Sequence[Use], samples: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(samples):
        parts = uses if samples == 1 else [use.take(slice(sample, sample + 1)) for use in uses]
        total += sum(part.weight_gradients(1, layer.rows) for part in parts).square().sum(dtype=torch.float64).cpu()  # type: ignore[union-attr]
    return total


def design_order(task: Task) -> int | None:
    """The least order, a power of two, of a design for all logits of a sample together.

    None where it would be large, or where batches differ in form: draws are then independent.

    Raises:
        MpqError: a loss other than cross-entropy.
    """
    with outputs_of(task.model) as outputs:
        predictions(task.model, task.batches[0], task.loss_fn)
    shapes = {tuple(tensor.shape[1:] for tensor in tensors_in(batch)) for batch in task.batches}
    size = sum(logits[0].numel() for logits in outputs)
    alike = len(shapes) == 1 and all(len(logits) == samples_in(task.batches[0]) for logits in outputs)
    return int(2 ** (size - 1).bit_length()) if alike and size <= LARGEST else None


def straight_layers(task: Task) -> list[bool]:
    """Whether the model's outputs have no second derivative in the layer's own weight: of every layer.

    So it is in networks of linear layers, ReLU and pooling, where H_ii is Gauss-Newton's block whatever the labels. The
    product of that derivative with a random vector is then exactly zero, which is checked on one sample. If none of a
    few layers is straight, the others are not checked and assumed curved.
    """
    count = len(task.layers)
    few = sorted({count * k // TRIED for k in range(TRIED)})
    weights: list[Tensor] = [task.module(layer).weight for layer in task.layers]  # type: ignore[misc]
    sample = task.few_samples(1)
    with only_gradients_of(task.model, weights), differentiable_twice(), outputs_of(task.model) as outputs:
        task.loss_fn(task.model, sample)
        if not outputs:
            return [False] * count
        parts = [
            (each * seeded_normal(each.shape, task.seed, "straight", k).to(each.device)).sum()
            for k, each in enumerate(outputs)
        ]
        slopes = Hessian(torch.stack(parts).sum(), outputs, weights)

        def straight(i: int) -> bool:
            vector = seeded_normal(weights[i].shape, task.seed, "bend", i).to(weights[i].device)
            return not bool(slopes.block(i, vector).any())

        known = {i: straight(i) for i in few}
        return [known[i] if i in known else any(known.values()) and straight(i) for i in range(count)]


def slope_scales(task: Task) -> list[float]:
    """Every layer's 1 / sqrt(Tr(G_ii)), from one draw of the first batch; the median's where a layer's trace is 0."""
    (traces,) = task.numbers(
        {"scales": 0}, lambda indices: (next(gauss_newton_draws(task, None, index, [0])) for index in indices)
    )
    positive = sorted(trace for trace in traces if trace > 0) or [1.0]
    return [(trace if trace > 0 else positive[len(positive) // 2]) ** -0.5 for trace in traces]
