"""Output gradients, passed to a callback layer by layer during the backward pass: one layer's are in memory at a time.

Batches are cut into pieces whose graphs fit a limit of memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mpq.network.calibration import Batch, check_gradient, check_loss, logits_of, samples_in, take
from mpq.network.storage import numbers_kept, release_memory
from mpq.sensitivity.derivatives import Draw, Use, keep_samples, recording, slopes_of
from mpq.sensitivity.graph import only_gradients_of
from mpq.sensitivity.predictions import predictions
from mpq.sensitivity.samples import check_independent
from mpq.sensitivity.task import Task

GRAPH = 2**26  # numbers that the graph of one piece may keep: 256 MB in float32

Call: TypeAlias = tuple[str, nn.Module, Tensor, Tensor]  # layer name, module, inputs, outputs


@dataclass(frozen=True)
class Piece:
    """Neighbouring samples of a batch, with the mean of their losses."""

    batch: Batch
    index: int  # index of the whole batch
    start: int  # its first sample

    @property
    def samples(self) -> int:
        """Number of samples."""
        return samples_in(self.batch)

    def split(self, size: int) -> "Iterator[Piece]":
        """The same in pieces of at most `size` samples."""
        for start in range(0, self.samples, size):
            yield Piece(take(self.batch, slice(start, start + size)), self.index, self.start + start)


See: TypeAlias = Callable[[str, Piece, list[Use]], None]  # see(layer name, piece, all calls of the layer)


def pieces(task: Task, what: str) -> Iterator[Piece]:
    """This process's batches in pieces whose graphs keep at most GRAPH numbers, or of one sample; a progress bar."""
    for index in task.own_batches(what):
        whole = Piece(task.batches[index], index, 0)
        parts: Iterable[Piece] = [whole]
        if whole.samples > 1 and not task.together:
            parts = whole.split(max(1, GRAPH // numbers_kept(task.model, task.few_samples(1, index), task.loss_fn)))
        for part in parts:
            yield part
            release_memory()  # what one pass frees is too scattered for the next


@dataclass(frozen=True)
class Labels:
    """Source of the labels for gradients."""

    kind: str = "model"  # "data", or "model": random slopes as if they were drawn from the model's own predictions
    draws: int = 1
    temperature: float = 1.0  # temperature of the predictions


def stream_uses(task: Task, piece: Piece, see: See, labels: Labels, *, apart: bool = False) -> None:
    """Pass every layer's calls to `see`, from one forward pass over a piece and one backward pass for each draw.

    The calls of one layer are passed together, once for each draw, as soon as the backward pass has reached them all;
    layers without gradients are skipped. Gradients are scaled to each sample's own loss, as those of
    `mpq.sensitivity.derivatives.layer_uses`.

    Args:
        task: model, data and layers.
        piece: of a batch.
        see: receives the calls; they are freed afterwards.
        labels: whose gradients are taken.
        apart: whether every call must have the samples as its first dimension; a piece in which one has not comes
            sample by sample.
    """
    outputs: list[Any] = []
    handle = task.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with only_gradients_of(task.model), recording(task.model, task.layers) as calls:
            loss = check_loss(task.loss_fn(task.model, piece.batch), piece.index)
    finally:
        handle.remove()
    if apart and not keep_samples(task, [Use(*call[1:]) for call in calls], piece.samples):
        check_independent(task, piece.batch, piece.index)
        for sample in piece.split(1):
            stream_uses(task, sample, see, labels)
        return
    if not calls:
        return
    top, weights = [loss], [torch.ones_like(loss)]
    if labels.kind == "data":
        check_gradient(loss)
    else:
        top = [logits_of(output) for output in outputs]
        loss = loss.detach()
        weights = [prediction.weights for prediction in predictions(task.model, piece.batch, task.loss_fn, outputs)]
    outputs.clear()
    for draw in range(labels.draws):
        slopes = [torch.full_like(loss, 0 if task.flat else piece.samples)]
        if labels.kind == "model":
            seeds, soft = Draw((piece.index, piece.start, draw)), [each.detach() / labels.temperature for each in top]
            slopes = slopes_of(task, seeds, soft, [weight * piece.samples for weight in weights])
        _pass_back(calls, top, slopes, lambda name, uses: see(name, piece, uses), draw + 1 == labels.draws)


def _pass_back(
    calls: list[Call], top: list[Tensor], slopes: list[Tensor], see: Callable[[str, list[Use]], None], last: bool
) -> None:
    left, met = Counter(name for name, *_ in calls), dict[str, list[Use]]()

    @torch.no_grad()
    def arrive(name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        met.setdefault(name, []).append(Use(module, inputs, gradient))
        left[name] -= 1
        if not left[name]:
            see(name, met.pop(name))

    handles = [
        output.register_hook(partial(arrive, name, module, inputs))  # type: ignore[no-untyped-call]
        for name, module, inputs, output in calls
    ]
    if last:
        calls.clear()
    try:
        torch.autograd.backward(top, slopes, retain_graph=not last)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, uses in met.items():  # no gradient reached their other calls
            see(name, uses)
