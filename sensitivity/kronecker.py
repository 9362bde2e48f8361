"""Kronecker-factored curvature: second moment of the inputs x second moment of the output gradients."""

import logging

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import samples_in
from mpq.network.moments import half_gram, whole_gram
from mpq.network.parallel import total
from mpq.sensitivity.derivatives import Use, layer_uses
from mpq.sensitivity.output import Sums, activation_formats, add, joint_error, joint_inputs, stacked
from mpq.sensitivity.standard_error import power_sums, relative_error
from mpq.sensitivity.task import Scores, Task, score_errors

WIDEST = 4096  # output channels whose gradients' moment is kept whole; of more, its diagonal

log = logging.getLogger(__name__)


def kronecker(task: Task, *, labels: str = "auto") -> Scores:
    """Predicted loss increase 1/2 * tr(G dW A dW^T) / tr(G) of every layer and scheme.

    A = E_n sum_t |d_t|^2 x_t x_t^T and G = sum over all positions of d_t d_t^T: the layer's Fisher block as
    A (x) G / tr(G), Kronecker factors (K-FAC, arXiv 1503.05671; for convolutions arXiv 1602.01407, equation 31, whose
    positions are likewise taken as independent) in which each position counts by its squared gradient. So the block's
    trace is exact, and positions that do not move the loss, such as padding and a sequence's first tokens with their
    huge activations, weigh nothing. Against `output`, errors of different output channels meet. An embedding's A sums
    the squared gradients of each token. The standard error is that of E_n sum_t |x_t|^2 |d_t|^2, over samples.

    Args:
        task: model, data, layers and schemes.
        labels: "auto", "data" or "model", see `layer_uses`.
    """
    statistics = {layer.name: KroneckerStatistics(layer, activation_formats(task)) for layer in task.layers}
    for index in task.own_batches("output gradients"):
        for samples, uses in layer_uses(task, index, labels):
            for layer in task.layers:
                statistics[layer.name].add(uses[layer.name], samples)
    for statistic in statistics.values():
        statistic.sums = total(statistic.sums)
    samples = sum(samples_in(batch) for batch in task.batches)

    def score(layer: Layer, scheme: Scheme, difference: Tensor) -> tuple[float, float]:
        statistic = statistics[layer.name]
        error = joint_error(task, layer, scheme, difference.cpu())
        value = 0.5 * statistic.error(error, scheme.activation) / samples
        return value, value * relative_error(statistic.sums["power sums"])

    return score_errors(task, score)


class KroneckerStatistics:
    """Both factors of a layer, summed over samples."""

    def __init__(self, layer: Layer, formats: tuple[Format | None, ...] = (None,)) -> None:
        self.layer = layer
        self.formats = formats
        # An activation format, or None: moment of the inputs, each weighted by |d_t|^2, (groups, half of cols x cols).
        # "gradients": theirs, (groups, half of rows / groups squared), or "diagonal" of it; "trace": (groups, 1, 1).
        # "tokens", an embedding's: (rows, 1), each one's sum of |d_t|^2; "token gradients": (cols, cols).
        # "power sums": of the samples' sums of |x_t|^2 |d_t|^2.
        self.sums: Sums = {}

    def add(self, uses: list[Use], samples: int) -> None:
        """Take the calls of the layer on some samples."""
        sizes = torch.zeros(samples, dtype=torch.float32)
        for use in uses:
            if isinstance(use.module, nn.Embedding):
                slopes = use.gradient.float().flatten(0, -2)
                squares = slopes.square().sum(-1)
                weights = torch.bincount(use.inputs.flatten(), squares, minlength=self.layer.rows).unsqueeze(1)
                add(self.sums, "tokens", weights.cpu())
                add(self.sums, "token gradients", (slopes.mT @ slopes).cpu())
                sizes += squares.reshape(samples, -1).sum(1).cpu()
                continue
            inputs, slopes = use.rows(samples)
            lengths = torch.linalg.vector_norm(slopes, dim=-1, keepdim=True)
            for format in self.formats:
                rows = stacked(lengths * (inputs if format is None else joint_inputs(use, samples, format)))
                add(self.sums, format, half_gram(rows).cpu())
            flat = stacked(slopes)
            if flat.shape[-1] <= WIDEST:
                add(self.sums, "gradients", half_gram(flat).cpu())
            else:
                add(self.sums, "diagonal", flat.square().sum(1).cpu())
            add(self.sums, "trace", flat.square().sum((1, 2), keepdim=True).cpu())
            sizes += (lengths * inputs).square().sum((1, 2, 3)).cpu()
        add(self.sums, "power sums", power_sums(sizes))

    def error(self, difference: Tensor, format: Format | None = None) -> float:
        """tr(G dW A dW^T) / tr(G), summed over the samples, of a `joint_error` (rows, cols or 2 cols)."""
        error = 0.0
        if "tokens" in self.sums:
            own = difference[:, : self.layer.cols]
            seen = (own @ self.sums["token gradients"]) * own * self.sums["tokens"]
            trace = self.sums["token gradients"].trace().item()
            error += seen.sum(dtype=torch.float64).item() / trace if trace > 0 else 0.0
        if "trace" in self.sums:
            moment = whole_gram(self.sums[format], difference.shape[1])
            blocks = difference.reshape(len(moment), -1, difference.shape[1])
            if "diagonal" in self.sums:
                weighted = self.sums["diagonal"].unsqueeze(-1) * blocks
            else:
                weighted = whole_gram(self.sums["gradients"], blocks.shape[1]) @ blocks
            shares = weighted / torch.where(self.sums["trace"] > 0, self.sums["trace"], 1.0)
            error += ((blocks @ moment) * shares).sum(dtype=torch.float64).item()
        return max(error, 0.0)
