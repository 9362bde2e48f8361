"""Inputs of layers and loss gradients of their outputs, from one forward and one backward pass."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.network.calibration import Batch, check_gradient, check_loss, outputs_of, samples_in, seeded, split_batch
from mpq.network.layers import input_matrix, output_matrix, weight_groups
from mpq.network.uses import seeing_uses
from mpq.sensitivity.graph import only_gradients_of
from mpq.sensitivity.predictions import Predictions, predictions, random_slopes
from mpq.sensitivity.samples import check_independent
from mpq.sensitivity.task import Task

log = logging.getLogger(__name__)

LABELS = ("data", "model", "auto")


@dataclass(frozen=True)
class Use:
    """One use of a layer's weight: its module or a stand-in, the inputs, and the loss gradients of the outputs."""

    module: nn.Module
    inputs: Tensor  # (samples, ...)
    gradient: Tensor  # (samples, ...), of each sample's own loss

    def rows(self, samples: int) -> tuple[Tensor, Tensor]:
        """Inputs (samples, groups, positions, cols) and gradients (samples, groups, positions, rows / groups)."""
        return self._by_sample(input_matrix(self.module, self.inputs), samples), self.slope_rows(samples)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Inputs (groups, positions, cols) and gradients (groups, positions, rows / groups), all samples' positions."""
        groups = weight_groups(self.module)
        inputs, slopes = input_matrix(self.module, self.inputs), output_matrix(self.module, self.gradient)
        return (
            inputs.float().reshape(groups, -1, inputs.shape[-1]),
            slopes.float().reshape(groups, -1, slopes.shape[-1]),
        )

    def slope_rows(self, samples: int) -> Tensor:
        """The gradients of `rows` alone."""
        return self._by_sample(output_matrix(self.module, self.gradient), samples)

    def _by_sample(self, matrix: Tensor, samples: int) -> Tensor:
        groups = weight_groups(self.module)
        return matrix.float().reshape(groups, samples, -1, matrix.shape[-1]).transpose(0, 1)

    def weight_gradients(self, samples: int, rows: int) -> Tensor:
        """Each sample's gradient of the weight matrix, (samples, rows, cols)."""
        if isinstance(self.module, nn.Embedding):
            return self.by_token(self.gradient.float(), samples, rows)
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) and keeps_samples(self, samples):
            return _convolution_gradients(self.module, self.inputs, self.gradient)
        inputs, gradient = self.rows(samples)
        return (gradient.mT @ inputs).flatten(1, 2)

    def by_token(self, values: Tensor, samples: int, rows: int) -> Tensor:
        """Numbers (..., cols) in an embedding's outputs, summed by sample and token: (samples, rows, cols)."""
        tokens = self.inputs.reshape(samples, -1)
        place = (tokens + rows * torch.arange(samples, device=tokens.device).unsqueeze(1)).flatten()
        sums = values.new_zeros(samples * rows, values.shape[-1])
        return sums.index_add_(0, place, values.flatten(0, -2)).reshape(samples, rows, -1)

    def take(self, samples: slice) -> "Use":
        """The same call on some of the samples."""
        return Use(self.module, self.inputs[samples], self.gradient[samples])


def _convolution_gradients(module: nn.Conv1d | nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Each sample's gradient of the weight matrix, (samples, rows, cols), by the backward kernel, sample by sample.

    Without unfolding: a depthwise layer's takes a twentieth of the time of products of its windows.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs.float(), module._reversed_padding_repeated_twice, mode=mode)
    slopes, none = gradient.float(), [0] * len(module.kernel_size)
    weight = slopes.new_empty(module.weight.shape)  # its values are not used
    gradients = [
        torch.ops.aten.convolution_backward(
            slope, sample, weight, None, module.stride, none, module.dilation, False, none, module.groups,
            [False, True, False],
        )[1]
        for sample, slope in zip(torch.split(padded, 1), torch.split(slopes, 1), strict=True)
    ]  # fmt: skip
    return torch.stack(gradients).flatten(2)


Uses: TypeAlias = dict[str, list[Use]]  # by layer name, in the order of the calls


def layer_uses(task: Task, index: int, labels: str = "data", draw: int = 0) -> Iterator[tuple[int, Uses]]:
    """Yield (samples, uses) of batch `index`: one forward and one backward pass, without gradients of weights.

    The task's loss is a mean over samples; gradients are scaled to belong to each sample's own loss. The batch comes
    in one piece when every layer keeps the samples as its first dimension, sample by sample when one does not
    (experts that see some tokens of many samples, say).

    Args:
        task: model, data and layers.
        index: of the batch, and of the message when its loss is NaN.
        labels: "data", or "model": random slopes of the outputs whose second moment is the loss's Hessian there, as
            if labels were drawn from the model's own predictions, each prediction on its own. Squares of these
            gradients are on average Gauss-Newton's curvature, also where a network has memorized its data, and where
            the loss averages many predictions of one sample. "auto": the model's where the loss is cross-entropy, else
            the data's, said in the log.
        draw: number of the random draw.

    Raises:
        MpqError: a NaN loss, unknown labels, labels "model" for a loss other than cross-entropy, or a batch that must
            be split and whose samples depend on each other.
    """
    if labels not in LABELS:
        raise MpqError(f"gradients come from labels {' or '.join(LABELS)}, not {labels!r}")
    batch = task.batches[index]
    samples = samples_in(batch)
    asked = None
    if labels == "auto":
        asked = loss_predictions(task, batch)
        labels = "data" if asked is None else "model"
    seeds = None if labels == "data" else (index, draw)
    (uses,) = _run(task, batch, index, [None if seeds is None else Draw(seeds)], asked)
    if keep_samples(task, chain.from_iterable(uses.values()), samples):
        yield samples, uses
        return
    check_independent(task, batch, index)
    for number, sample in enumerate(split_batch(batch)):
        (uses,) = _run(task, sample, index, [None if seeds is None else Draw((*seeds, number))])
        yield 1, uses


def designed_uses(
    task: Task, index: int, draws: Sequence[int], order: int | None = None
) -> Iterator[tuple[int, list[Uses]]]:
    """Yield (samples, uses of each draw) of batch `index` with labels "model", from one forward pass.

    With a design the signs of draw k are random ones, the same for all draws, times row k of a Hadamard matrix of this
    order, rows shuffled, columns running over a sample's logits: the whole set of draws gives the mean over all signs
    exactly, and fewer one with the variance of sampling without replacement. Without one all signs are random.
    """
    batch = task.batches[index]
    samples = samples_in(batch)

    def wanted(*piece: int) -> list[Draw | None]:
        if order is None:
            return [Draw((index, draw, *piece)) for draw in draws]
        return [Draw((index, "design", *piece), (draw, order)) for draw in draws]

    runs = _run(task, batch, index, wanted())
    first = next(runs)
    if keep_samples(task, chain.from_iterable(first.values()), samples):
        yield samples, [first, *runs]
        return
    check_independent(task, batch, index)
    for number, sample in enumerate(split_batch(batch)):
        yield 1, list(_run(task, sample, index, wanted(number)))


def design_row(seed: int, row: int, order: int) -> Tensor:
    """Signs (order,): a row of Sylvester's matrix, (-1)^(number of common bits of row and column), rows shuffled."""
    shuffled = torch.randperm(order, generator=seeded(seed, "design"))
    common = int(shuffled[row]) & torch.arange(order)
    parity = torch.zeros_like(common)
    while bool(common.any()):
        parity, common = parity ^ (common & 1), common >> 1
    return 1.0 - 2.0 * parity


def loss_predictions(task: Task, batch: Batch) -> list[Predictions] | None:
    """Weights and targets of the loss's predictions; None, with a note in the log, if it is not cross-entropy."""
    try:
        with only_gradients_of(task.model):
            return predictions(task.model, batch, task.loss_fn)
    except (MpqError, AttributeError, TypeError, RuntimeError) as error:  # outputs may be of any kind
        log.warning("gradients are of the data's own labels: %s", error)
        return None


def keep_samples(task: Task, uses: Iterable[Use], samples: int) -> bool:
    """Whether every call has the samples as its first dimension, or there is but one sample."""
    return samples == 1 or (not task.second and all(keeps_samples(use, samples) for use in uses))


def keeps_samples(use: Use, samples: int) -> bool:
    """Whether the call has the samples as its first dimension."""
    least = 1 if isinstance(use.module, nn.Embedding) else 2
    if isinstance(use.module, (nn.Conv1d, nn.Conv2d)):
        least = len(use.module.kernel_size) + 2
    return use.inputs.ndim >= least and len(use.inputs) == len(use.gradient) == samples


@dataclass(frozen=True)
class Draw:
    """Source of random slopes: seeds, and row and order of the design where there is one."""

    seeds: tuple[object, ...]
    design: tuple[int, int] | None = None


def _run(
    task: Task, batch: Batch, index: int, draws: Sequence[Draw | None], asked: list[Predictions] | None = None
) -> Iterator[Uses]:
    """The uses for each draw, or for the data's own labels (None), from one forward pass; `asked` where it is known."""
    samples = samples_in(batch)
    with only_gradients_of(task.model), recording(task.model, task.layers) as calls:
        with outputs_of(task.model) as logits:
            loss = check_loss(task.loss_fn(task.model, batch), index)
        recorded = list(calls)
        if asked is None and draws != [None]:
            asked = predictions(task.model, batch, task.loss_fn)
    outputs = [output for *_, output in recorded]
    if not outputs:
        for _ in draws:
            yield {layer.name: [] for layer in task.layers}
        return
    for number, draw in enumerate(draws, 1):
        if draw is None or asked is None:
            top, slopes = [check_gradient(loss)], [torch.full_like(loss, 0 if task.flat else samples)]
        else:
            top, slopes = logits, slopes_of(task, draw, logits, [prediction.weights * samples for prediction in asked])
        gradients = torch.autograd.grad(
            top, outputs, slopes, retain_graph=number < len(draws), allow_unused=True, materialize_grads=True
        )
        uses: Uses = {layer.name: [] for layer in task.layers}
        for (name, module, inputs, _), gradient in zip(recorded, gradients, strict=True):
            uses[name].append(Use(module, inputs, gradient))
        yield uses


def slopes_of(task: Task, draw: Draw, logits: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Random slopes of the logits, see `random_slopes`, for every call of the model."""
    generator = seeded(task.seed, "labels", *draw.seeds)
    flips: list[Tensor | None] = [None] * len(logits)
    if draw.design is not None:
        signs, start = design_row(task.seed, *draw.design), 0
        for number, each in enumerate(logits):
            size = each[0].numel()
            flips[number], start = signs[start : start + size].view(each.shape[1:]), start + size
    parts = zip(logits, weights, flips, strict=True)
    return [random_slopes(each.detach(), share, generator, flip) for each, share, flip in parts]


@contextmanager
def recording(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[tuple[str, nn.Module, Tensor, Tensor]]]:
    """(layer name, module, inputs, outputs) of every use inside the block, see `seeing_uses`; the outputs require
    gradients.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def see(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        calls.append((name, module, inputs.detach(), output))
        return output.clone()  # what follows may change it in place

    with seeing_uses(model, layers, see):
        yield calls
