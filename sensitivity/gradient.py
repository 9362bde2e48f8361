"""Output gradients times the change of outputs that quantizing makes, in every scheme, without a further model pass."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import samples_in
from mpq.network.layers import matrix_to_weight
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.derivatives import Use, Uses, layer_uses
from mpq.sensitivity.task import Scores, Task

HELD = 2**28  # numbers of inputs and gradients held at a time; weights are rounded once for each such portion

Pass = list[tuple[int, Uses]]  # what one batch's pass recorded: (samples, uses), in one or several pieces
Meet = Callable[[list[tuple[Tensor, Tensor]]], Tensor]  # (gradient, change) of each call -> (samples,)


def gradient(task: Task, *, labels: str = "data", draws: int = 1) -> Scores:
    """Score 1/2 * E_n sum_t sum_r d_tr^2 (change of output r at t)^2 of every layer and scheme.

    NVIDIA ModelOpt's `auto_quantize` ranks by this sum (without the half); `output` is its cheaper approximation by
    moments. The change is exact: the layer is run once more with Q(W) - W, and with the rounding errors of its inputs.
    The standard error is over samples.

    Args:
        task: model, data, layers and schemes.
        labels: "data" or "model", see `layer_uses`.
        draws: random gradients for each batch, with labels "model".
    """

    def squares(calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(slope * change).square().flatten(1).sum(1) for slope, change in calls]).sum(0)

    return _meeting(task, squares, labels, draws)


def quadratic(task: Task, *, labels: str = "model", draws: int = 2) -> Scores:
    """Predicted loss increase 1/2 * E_n (sum_t d_t . change of output at t)^2 of every layer and scheme.

    With labels "model" this is 1/2 dw^T G dw, the loss's second-order term with Gauss-Newton's curvature, unbiased and
    with nothing left out within the layer: errors at all positions and channels meet with their signs. With labels
    "data" it is the same form of the empirical Fisher matrix. The standard error is over samples; the random slopes
    alone put it at sqrt(2 / (draws * samples)) of the score.

    Args:
        task: model, data, layers and schemes.
        labels: "data" or "model", see `layer_uses`.
        draws: random gradients for each batch, with labels "model".
    """

    def square_of_sum(calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(slope * change).flatten(1).sum(1) for slope, change in calls]).sum(0).square()

    return _meeting(task, square_of_sum, labels, draws)


def _meeting(task: Task, meet: Meet, labels: str, draws: int) -> Scores:
    """Half the mean over samples of `meet`, with its standard error."""
    draws = 1 if labels == "data" else draws

    def work(missing: Sequence[tuple[int, int]]) -> Iterator[list[float]]:
        for portion in _portions(task, missing, labels):
            yield from _sums(task, portion, meet).reshape(len(portion), -1).tolist()

    items = {
        f"draw {draw} of batch {index}": (index, draw) for index in range(len(task.batches)) for draw in range(draws)
    }
    gradients = np.array(task.numbers(items, work))
    sums = gradients.sum(0).reshape(2, len(task.layers), len(task.schemes))
    count = draws * sum(samples_in(batch) for batch in task.batches)
    means = sums[0] / count
    variances = np.maximum(sums[1] / count - means**2, 0) * count / max(count - 1, 1)
    errors = np.sqrt(variances / count) if count > 1 else means
    return 0.5 * means, 0.5 * errors


def _portions(task: Task, passes: Sequence[tuple[int, int]], labels: str) -> Iterator[list[Pass]]:
    """Records of several passes (batch, draw), as many together as HELD allows."""
    portion: list[Pass] = []
    held = 0
    for index, draw in task.track(passes, "output gradients"):
        portion.append(list(layer_uses(task, index, labels, draw)))
        recorded_uses = [use for _, uses in portion[-1] for calls in uses.values() for use in calls]
        held += sum(use.inputs.numel() + use.gradient.numel() for use in recorded_uses)
        if held >= HELD:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


def _sums(task: Task, portion: list[Pass], meet: Meet) -> NDArray[np.float64]:
    """Sum over each pass's samples of the numbers and of their squares, (passes, 2, layers, schemes)."""
    sums = np.zeros((len(portion), 2, len(task.layers), len(task.schemes)))
    for i, layer in enumerate(task.track(task.layers, "changes of outputs")):
        for j, scheme in enumerate(task.schemes):
            difference = task.weight_error(layer, scheme)
            for k, samples, uses in ((k, *part) for k, parts in enumerate(portion) for part in parts):
                calls = [_change(task, layer, scheme, use, difference) for use in uses[layer.name]]
                if calls:
                    numbers = meet([_by_sample(call, samples) for call in calls]).double()
                    sums[k, 0, i, j] += numbers.sum().item()
                    sums[k, 1, i, j] += numbers.square().sum().item()
    return sums


@torch.no_grad()
def _change(task: Task, layer: Layer, scheme: Scheme, use: Use, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and change of the output of one call: dW Q(x) + W dx."""
    module = use.module
    if isinstance(module, nn.Embedding):
        return use.gradient, functional.embedding(use.inputs, difference.to(use.inputs.device, use.gradient.dtype))
    place = use.gradient  # the weights may be elsewhere, see `mpq.network.offload`
    weights = {"weight": matrix_to_weight(difference, module).to(place.device, use.inputs.dtype)}
    if getattr(module, "bias", None) is not None:
        weights["bias"] = torch.zeros_like(module.bias, device=place.device, dtype=use.inputs.dtype)  # type: ignore[arg-type]
    if scheme.activation is None:
        return use.gradient, functional_call(module, weights, use.inputs)
    rounded = fake_quantize_inputs(module, use.inputs, scheme.activation)
    plain = {**weights, "weight": module.weight.to(place.device, use.inputs.dtype)}
    change = functional_call(module, weights, rounded) + functional_call(module, plain, rounded - use.inputs)  # type: ignore[arg-type]
    return use.gradient, change


def _by_sample(call: tuple[Tensor, Tensor], samples: int) -> tuple[Tensor, Tensor]:
    slope, change = (tensor.float().reshape(samples, -1) for tensor in call)
    return slope, change
