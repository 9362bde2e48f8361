"""Squared error of the layers' outputs, tr(dW E[x x^T] dW^T), weighted by the loss's gradient in each output."""

from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import samples_in
from mpq.network.layers import weight_matrix
from mpq.network.parallel import total
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.derivatives import Use, layer_uses
from mpq.sensitivity.standard_error import power_sums, relative_error
from mpq.sensitivity.task import Scores, Task, score_errors

Sums: TypeAlias = dict[str | Format | None, Tensor]  # sums over samples, by name


def output(task: Task, *, weighted: bool = True, labels: str = "data") -> Scores:
    """Predicted loss increase 1/2 * E_n sum_t sum_r d_tr^2 e_tr^2 of every layer and scheme, e_t = Q(W) Q(x_t) - W x_t.

    Of sample n, x_t is the layer's input at position t and d_t the loss gradient of its output there: a Fisher
    approximation in the outputs that takes errors at different positions and channels as independent. With the input
    moments kept whole, errors that the inputs do not see cost nothing (the objective of GPTQ, arXiv 2210.17323,
    equation 1; weighting by gradients as in Kronecker-factored curvature, arXiv 1503.05671). The squares d_tr^2 are
    replaced by a product of a position's and a channel's share, so one (cols, cols) matrix per layer serves every
    weight format, and one (2 cols, 2 cols) matrix all schemes of an activation format. As in `fisher`, with the data's
    labels a loss that averages predictions within a sample shrinks the scores of all layers alike, and so does data
    that is already fitted. The standard error is that of the layer's whole sum of d_tr^2 x_t^2, over samples.

    Args:
        task: model, data, layers and schemes.
        weighted: False leaves gradients out: the plain squared output error E_n sum_t ||e_t||^2, which says what
            a layer's output loses but not what that costs. Positions that no gradient reaches (padding) do not count.
        labels: "data" or "model", see `layer_uses`.
    """
    statistics = output_statistics(task, weighted, labels)
    samples = sum(samples_in(batch) for batch in task.batches)
    half = 0.5 if weighted else 1.0

    def score(layer: Layer, scheme: Scheme, difference: Tensor) -> tuple[float, float]:
        statistic = statistics[layer.name]
        error = joint_error(task, layer, scheme, difference.cpu())
        value = half * statistic.error(error, scheme.activation) / samples
        return value, value * relative_error(statistic.sums["power sums"])

    return score_errors(task, score)


def gptq(task: Task) -> Scores:
    """Squared output error tr(dW E[X X^T] dW^T), GPTQ's objective (equation 1), per sample; not on the loss's scale."""
    return output(task, weighted=False)


def output_statistics(task: Task, weighted: bool, labels: str = "data") -> "dict[str, OutputStatistics]":
    """Every layer's sums over all samples, by layer name."""
    statistics = {layer.name: OutputStatistics(layer, activation_formats(task)) for layer in task.layers}
    for index in task.own_batches("output gradients"):
        for samples, uses in layer_uses(task, index, labels):
            for layer in task.layers:
                statistics[layer.name].add(uses[layer.name], samples, weighted)
    for statistic in statistics.values():
        statistic.sums = total(statistic.sums)
    return statistics


def activation_formats(task: Task) -> tuple[Format | None, ...]:
    """The distinct activation formats of the schemes; None, for inputs as they are, first and always."""
    return tuple(dict.fromkeys([None, *(scheme.activation for scheme in task.schemes)]))


def joint_error(task: Task, layer: Layer, scheme: Scheme, difference: Tensor) -> Tensor:
    """Factor of `joint_inputs` in the error of outputs: dW, or [dW, W] when inputs are quantized too."""
    if scheme.activation is None:
        return difference
    return torch.cat([difference, weight_matrix(task.module(layer)).detach().float().to(difference.device)], 1)


def joint_inputs(use: Use, samples: int, format: Format | None) -> Tensor:
    """Inputs x (samples, groups, positions, cols), or [Q(x), Q(x) - x] with 2 cols.

    Q(W) Q(x) - W x = dW Q(x) + W (Q(x) - x).
    """
    if format is None:
        return use.rows(samples)[0]
    rounded = replace(use, inputs=fake_quantize_inputs(use.module, use.inputs, format))
    shift = replace(use, inputs=rounded.inputs - use.inputs)
    return torch.cat([rounded.rows(samples)[0], shift.rows(samples)[0]], -1)


class OutputStatistics:
    """Sums over samples that give a layer's weighted output error for any weight error."""

    def __init__(self, layer: Layer, formats: tuple[Format | None, ...] = (None,)) -> None:
        self.layer = layer
        self.formats = formats
        # An activation format, or None: (groups, cols, cols), sum of a_t x_t x_t^T, a_t the mean of d_tr^2 over r.
        # "channels": (groups, rows / groups), sum of d_tr^2 over t.
        # "looked up", an embedding's: (rows, cols), sum of d_tc^2 over the token's positions.
        # "power sums": of the samples' sums of d_tr^2 x_t^2.
        self.sums: Sums = {}

    def add(self, uses: list[Use], samples: int, weighted: bool) -> None:
        """Take the calls of the layer on some samples."""
        sizes = torch.zeros(samples, dtype=torch.float32)
        for use in uses:
            if isinstance(use.module, nn.Embedding):
                slopes = use.gradient.float()
                squares = use.by_token(
                    slopes.square() if weighted else _reached(slopes), samples, self.layer.rows
                ).cpu()
                add(self.sums, "looked up", squares.sum(0))
                sizes += squares.sum((1, 2))
            else:
                inputs, slopes = use.rows(samples)
                weights = slopes.square() if weighted else _reached(slopes)
                shares = weights.mean(-1, keepdim=True)  # (samples, groups, positions, 1)
                for format in self.formats:
                    rows = inputs if format is None else joint_inputs(use, samples, format)
                    add(self.sums, format, (stacked(rows * shares).mT @ stacked(rows)).cpu())
                add(self.sums, "channels", weights.sum((0, 2)).cpu())
                sizes += (inputs.square() * shares).sum((1, 2, 3)).cpu()
        add(self.sums, "power sums", power_sums(sizes))

    def error(self, difference: Tensor, format: Format | None = None) -> float:
        """Weighted squared output error, summed over the samples, of a `joint_error` (rows, cols or 2 cols)."""
        looked_up, channels = self.sums.get("looked up"), self.sums.get("channels")
        error = 0.0
        if looked_up is not None:
            error += (looked_up * difference[:, : self.layer.cols].square()).sum(dtype=torch.float64).item()
        if channels is not None:
            moment = self.sums[format]
            blocks = difference.reshape(len(moment), -1, difference.shape[1])
            errors = ((blocks @ moment) * blocks).sum(-1)
            mean = channels.mean(-1, keepdim=True)
            shares = torch.where(mean > 0, channels / mean, torch.zeros_like(channels))
            error += (errors * shares).sum(dtype=torch.float64).item()
        return max(error, 0.0)

    def trace(self) -> float:
        """Sum of `error` over unit errors in every single weight."""
        trace = 0.0
        if "looked up" in self.sums:
            trace += self.sums["looked up"].sum(dtype=torch.float64).item()
        if None in self.sums:
            traces = self.sums[None].diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)
            trace += traces.sum().item() * self.layer.rows / len(traces)
        return trace


def _reached(slopes: Tensor) -> Tensor:
    """Ones in the gradients' shape (..., channels) at positions that any reaches, zeros at others such as padding.

    Ones everywhere when none reaches the call: the layer lies before an operation without derivatives.
    """
    reached = (slopes != 0).any(-1, keepdim=True)
    return (reached | ~reached.any()).to(slopes.dtype).expand_as(slopes)


def stacked(rows: Tensor) -> Tensor:
    """(samples, groups, positions, n) as (groups, samples * positions, n)."""
    return rows.transpose(0, 1).flatten(1, 2)


def add(sums: Sums, name: str | Format | None, part: Tensor) -> None:
    """Add to a sum that begins with its first part, which it may change in place."""
    sums[name] = part if name not in sums else sums[name].add_(part)
