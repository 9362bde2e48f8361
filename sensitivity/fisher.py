"""Diagonal of the empirical Fisher information times squared weight errors, from per-sample gradients."""

import torch
from torch import Tensor

from mpq.core.layer import Layer
from mpq.network.calibration import samples_in
from mpq.network.parallel import total
from mpq.sensitivity.derivatives import Use, layer_uses
from mpq.sensitivity.standard_error import power_sums, relative_error
from mpq.sensitivity.task import Scores, Task, score_weight_errors

CHUNK = 2**22  # numbers of per-sample gradients held at a time


def fisher(task: Task, *, labels: str = "data") -> Scores:
    """Predicted loss increase 1/2 * sum_j E_n[g_nj^2] (Q(w)_j - w_j)^2 of every layer and scheme.

    g_n is the gradient of sample n's own loss: squares of batch gradients would be smaller by up to the batch size.
    For the same reason a loss that is itself a mean over T predictions of one sample, such as the tokens of a sequence,
    gives scores about T times too small, in the same order. Near a minimum the Fisher information is the Hessian; the
    empirical one, with the data's own labels, vanishes with the training loss, so on memorized data a few samples
    dominate, with large standard errors. Per-sample gradients come from one forward and one backward pass per batch and
    one product per layer. The standard error is that of the layer's whole E||g_n||^2, over samples.

    Args:
        task: model, data, layers and schemes.
        labels: "model" takes gradients for random labels of the model's own, without the two defects above: the Fisher
            information proper, Gauss-Newton's diagonal. Cross-entropy only.
    """
    diagonals, sums = fisher_diagonals(task, labels)

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        weighted = diagonals[layer.name] * difference.cpu().square()
        value = 0.5 * weighted.sum(dtype=torch.float64).item()
        return value, value * relative_error(sums[layer.name])

    return score_weight_errors(task, score)


def fisher_diagonals(task: Task, labels: str = "data") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every layer's E_n[g_nj^2], (rows, cols), and the `power_sums` over samples of its sum, by layer name."""
    diagonals = {layer.name: torch.zeros(layer.rows, layer.cols, dtype=torch.float32) for layer in task.layers}
    sums = {layer.name: torch.zeros(3, dtype=torch.float64) for layer in task.layers}
    for index in task.own_batches("per-sample gradients"):
        for samples, uses in layer_uses(task, index, labels):
            for layer in task.layers:
                squares = _add_squares(diagonals[layer.name], uses[layer.name], samples, layer)
                sums[layer.name] += power_sums(squares)
    samples = sum(samples_in(batch) for batch in task.batches)
    return {name: squares / samples for name, squares in total(diagonals).items()}, total(sums)


def _add_squares(diagonal: Tensor, uses: list[Use], samples: int, layer: Layer) -> Tensor:
    """Add the samples' squared gradients to the diagonal; their sums (samples,). Several uses of a weight add up."""
    step = max(1, CHUNK // layer.params)
    totals = [torch.zeros(0, dtype=torch.float32)]
    for start in range(0, samples if uses else 0, step):
        count = min(step, samples - start)
        parts = uses if samples == 1 else [use.take(slice(start, start + count)) for use in uses]
        gradients = torch.stack([part.weight_gradients(count, layer.rows) for part in parts]).sum(0).square()
        diagonal += gradients.sum(0).cpu()
        totals.append(gradients.sum((1, 2)).cpu())
    return torch.cat(totals) if uses else torch.zeros(samples, dtype=torch.float32)
