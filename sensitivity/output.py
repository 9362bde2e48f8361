"""Squared error of the layers' outputs, tr(dW E[x x^T] dW^T), weighted by what each output means to the loss."""

import torch
from torch import Tensor, nn

from mpq.core.calibration import samples_in
from mpq.core.layer import Layer
from mpq.sensitivity.derivatives import Use, layer_uses
from mpq.sensitivity.spread import Spread
from mpq.sensitivity.task import Scores, Task, score_weight_errors


def output(task: Task, *, weighted: bool = True) -> Scores:
    """Predicted loss increase 1/2 * E_n sum_t sum_r d_tr^2 (dW x_t)_r^2 of every layer and scheme.

    Of sample n, x_t is the layer's input at position t and d_t the loss gradient of its output there: a Fisher
    approximation in the outputs that takes errors at different positions and channels as independent. With the input
    moments kept whole, errors that the inputs do not see cost nothing (the objective of GPTQ, arXiv 2210.17323,
    equation 1; weighting by gradients as in Kronecker-factored curvature, arXiv 1503.05671). The squares d_tr^2 are
    replaced by a product of a position's and a channel's share, so one (cols, cols) matrix per layer serves every
    format. As in `fisher`, a loss that averages predictions within a sample shrinks the scores of all layers alike, and
    so does data that is already fitted. The standard error is that of the layer's whole sum of d_tr^2 x_t^2, over
    samples.

    Args:
        task: model, data, layers and schemes.
        weighted: False leaves gradients out: the plain squared output error E_n sum_t ||dW x_t||^2, which says what
            a layer's output loses but not what that costs.
    """
    statistics = output_statistics(task, weighted)
    samples = sum(samples_in(batch) for batch in task.batches)
    half = 0.5 if weighted else 1.0

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        value = half * statistics[layer.name].error(difference.cpu()) / samples
        return value, value * statistics[layer.name].spread.relative_error()

    return score_weight_errors(task, score)


def output_statistics(task: Task, weighted: bool) -> "dict[str, OutputStatistics]":
    """Every layer's sums over all samples, by layer name."""
    statistics = {layer.name: OutputStatistics(layer) for layer in task.layers}
    for index in task.track(range(len(task.batches)), "output gradients"):
        for samples, uses in layer_uses(task.model, task.layers, task.batches[index], task.loss_fn, index):
            for layer in task.layers:
                statistics[layer.name].add(uses[layer.name], samples, weighted)
    return statistics


class OutputStatistics:
    """Sums over samples that give a layer's weighted output error for any weight error."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.moment: Tensor | None = None  # (groups, cols, cols): sum of a_t x_t x_t^T, a_t the mean of d_tr^2 over r
        self.channels: Tensor | None = None  # (groups, rows / groups): sum of d_tr^2 over t
        self.looked_up: Tensor | None = None  # (rows, cols), an embedding's: sum of d_tc^2 over the token's positions
        self.spread = Spread()

    def add(self, uses: list[Use], samples: int, weighted: bool) -> None:
        """Take the calls of the layer on some samples."""
        sizes = torch.zeros(samples)
        for use in uses:
            squares = use.gradient.float().square() if weighted else torch.ones_like(use.gradient)
            if isinstance(use.module, nn.Embedding):
                found = use.by_token(squares, samples, self.layer.rows).cpu()
                self.looked_up = _plus(self.looked_up, found.sum(0))
                sizes += found.sum((1, 2))
            else:
                inputs, weights = Use(use.module, use.inputs, squares).rows(samples)
                shares = weights.mean(-1, keepdim=True)  # (samples, groups, positions, 1)
                scaled = inputs * shares
                self.moment = _plus(self.moment, (_stacked(scaled).mT @ _stacked(inputs)).cpu())
                self.channels = _plus(self.channels, weights.sum((0, 2)).cpu())
                sizes += (scaled * inputs).sum((1, 2, 3)).cpu()
        self.spread.add(sizes)

    def error(self, difference: Tensor) -> float:  # difference: (rows, cols)
        """Weighted squared output error, summed over the samples."""
        total = 0.0
        if self.looked_up is not None:
            total += (self.looked_up * difference.square()).sum(dtype=torch.float64).item()
        if self.moment is not None and self.channels is not None:
            blocks = difference.reshape(len(self.moment), -1, difference.shape[1])
            errors = ((blocks @ self.moment) * blocks).sum(-1)
            mean = self.channels.mean(-1, keepdim=True)
            shares = torch.where(mean > 0, self.channels / mean, torch.zeros_like(self.channels))
            total += (errors * shares).sum(dtype=torch.float64).item()
        return max(total, 0.0)

    def trace(self) -> float:
        """Sum of `error` over unit errors in every single weight."""
        total = 0.0 if self.looked_up is None else self.looked_up.sum(dtype=torch.float64).item()
        if self.moment is not None:
            traces = self.moment.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)
            total += traces.sum().item() * self.layer.rows / len(traces)
        return total


def _stacked(rows: Tensor) -> Tensor:
    """(samples, groups, positions, n) as (groups, samples * positions, n)."""
    return rows.transpose(0, 1).flatten(1, 2)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
