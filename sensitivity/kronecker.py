"""Kronecker-factored curvature: second moment of the inputs x second moment of the output gradients."""

import logging

import torch
from torch import Tensor, nn

from mpq.core.calibration import samples_in
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.sensitivity.derivatives import Use, layer_uses
from mpq.sensitivity.output import activation_formats, joint_error, joint_inputs, plus, stacked
from mpq.sensitivity.spread import Spread
from mpq.sensitivity.task import Scores, Task, score_errors

WIDEST = 4096  # output channels whose gradients' moment is kept whole; of more, its diagonal

log = logging.getLogger(__name__)


def kronecker(task: Task, *, labels: str = "auto") -> Scores:
    """Predicted loss increase 1/2 * tr(G dW A dW^T) / M of every layer and scheme.

    A = E_n sum_t x_t x_t^T and G = sum over all M positions of d_t d_t^T: the layer's Fisher block as A (x) G / M
    (K-FAC, arXiv 1503.05671; for convolutions arXiv 1602.01407, equation 31, whose positions are likewise taken as
    independent). Against `output`, errors of different output channels meet, but inputs and gradients of a position do
    not. An embedding's A counts how often each token is looked up. The standard error is that of
    E_n sum_t |x_t|^2 |d_t|^2, over samples.

    Args:
        task: model, data, layers and schemes.
        labels: "auto", "data" or "model", see `layer_uses`.
    """
    statistics = {layer.name: KroneckerStatistics(layer, activation_formats(task)) for layer in task.layers}
    for index in task.track(range(len(task.batches)), "output gradients"):
        for samples, uses in layer_uses(task, index, labels):
            for layer in task.layers:
                statistics[layer.name].add(uses[layer.name], samples)
    samples = sum(samples_in(batch) for batch in task.batches)

    def score(layer: Layer, scheme: Scheme, difference: Tensor) -> tuple[float, float]:
        found = statistics[layer.name]
        error = joint_error(task, layer, scheme, difference.cpu())
        value = 0.5 * found.error(error, scheme.activation) / samples
        return value, value * found.spread.relative_error()

    return score_errors(task, score)


class KroneckerStatistics:
    """Both factors of a layer, summed over samples."""

    def __init__(self, layer: Layer, formats: tuple[Format | None, ...] = (None,)) -> None:
        self.layer = layer
        self.formats = formats
        self.inputs: dict[Format | None, Tensor] = {}  # by activation format: (groups, cols, cols)
        self.gradients: Tensor | None = None  # (groups, rows / groups, rows / groups), or its diagonal
        self.positions = 0
        self.tokens: Tensor | None = None  # (rows, 1), an embedding's: how often each token came
        self.token_gradients: Tensor | None = None  # (cols, cols)
        self.token_positions = 0
        self.spread = Spread()

    def add(self, uses: list[Use], samples: int) -> None:
        """Take the calls of the layer on some samples."""
        sizes = torch.zeros(samples)
        for use in uses:
            if isinstance(use.module, nn.Embedding):
                slopes = use.gradient.float().flatten(0, -2)
                counts = torch.bincount(use.inputs.flatten(), minlength=self.layer.rows).float().unsqueeze(1)
                self.tokens = plus(self.tokens, counts.cpu())
                self.token_gradients = plus(self.token_gradients, (slopes.mT @ slopes).cpu())
                self.token_positions += len(slopes)
                sizes += slopes.square().sum(-1).reshape(samples, -1).sum(1).cpu()
                continue
            inputs, slopes = use.rows(samples)
            for format in self.formats:
                rows = stacked(inputs if format is None else joint_inputs(use, samples, format))
                self.inputs[format] = plus(self.inputs.get(format), (rows.mT @ rows).cpu())
            flat = stacked(slopes)
            moment = flat.mT @ flat if flat.shape[-1] <= WIDEST else flat.square().sum(1)
            self.gradients = plus(self.gradients, moment.cpu())
            self.positions += flat.shape[1]
            sizes += (inputs.square().sum(-1) * slopes.square().sum(-1)).sum((1, 2)).cpu()
        self.spread.add(sizes)

    def error(self, difference: Tensor, format: Format | None = None) -> float:
        """tr(G dW A dW^T) / M, summed over the samples, of a `joint_error` (rows, cols or 2 cols)."""
        total = 0.0
        if self.tokens is not None and self.token_gradients is not None:
            own = difference[:, : self.layer.cols]
            seen = ((own @ self.token_gradients) * own * self.tokens).sum(dtype=torch.float64).item()
            total += seen / self.token_positions
        if self.gradients is not None:
            moment = self.inputs[format]
            blocks = difference.reshape(len(moment), -1, difference.shape[1])
            weighted = self.gradients @ blocks if self.gradients.ndim == 3 else self.gradients.unsqueeze(-1) * blocks
            total += ((blocks @ moment) * weighted).sum(dtype=torch.float64).item() / self.positions
        return max(total, 0.0)
