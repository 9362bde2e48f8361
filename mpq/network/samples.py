"""Arrangement of samples in batches: along the first dimension, along the second, or inseparable."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from mpq.core.errors import ChangedBatchError, MpqError, summary
from mpq.network.calibration import (
    Batch,
    LossFn,
    careful,
    check_loss,
    evaluating,
    mapped,
    outputs_of,
    samples_in,
    take,
    tensors_in,
)

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # relative; float32 errs by about 1e-6
TOGETHER = 0.02  # relative difference of a sample's loss alone and given twice; bfloat16 errs by about 0.005
TRIED = 4  # samples, for some may have no loss: all their labels are ignored


@dataclass(frozen=True)
class Samples:
    """Batches whose first dimension counts samples, and the loss that takes them."""

    batches: tuple[Batch, ...]
    loss_fn: LossFn
    second: bool = False  # originally, and so in the layers' inputs, samples are along the second dimension
    together: bool = False  # a batch cannot be cut: no sample has a loss of its own


@dataclass(frozen=True)
class Arrangement:
    """The dimension of the samples in batches, which are left unchanged."""

    second: bool = False  # along the second dimension
    together: bool = False  # a batch cannot be cut

    def count(self, batch: Batch) -> int:
        """Parts that a batch can be cut into: its samples, or 1."""
        if self.together:
            return 1
        return samples_in(_swapped(batch, _second_dimensions(batch)) if self.second else batch)

    def take(self, batch: Batch, samples: slice | list[int]) -> Batch:
        """Some samples of a batch, arranged as the whole; a batch that cannot be cut stays whole."""
        if self.together:
            return batch
        swaps = _second_dimensions(batch) if self.second else ()
        return _swapped(take(_swapped(batch, swaps), samples), swaps)


SAMPLES_FIRST = Arrangement()


@torch.no_grad()
def arrangement(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn) -> Arrangement:
    """The dimension of the samples, as in `arranged`; the first one if the loss is NaN or infinite.

    Raises:
        MpqError: a loss that adds up over samples.
    """
    with evaluating(model):
        if samples_in(batches[0]) == 1 or run_loss(model, batches[0], loss_fn)[0] is None:
            return SAMPLES_FIRST
        samples = arranged(model, tuple(batches), loss_fn, warn=False)
    return Arrangement(samples.second, samples.together)


@torch.no_grad()
def arranged(model: nn.Module, batches: tuple[Batch, ...], loss_fn: LossFn, warn: bool = True) -> Samples:
    """The batches with samples along the first dimension.

    Samples are along a dimension if one sample alone has a loss, and the same sample twice has the same loss and
    repeated outputs. If they are along the second, as in time-first recurrent networks, the batches are transposed, and
    back for the loss. If they are along neither, as with contrastive losses and batch statistics, batches stay whole,
    with a warning in the log if `warn`.

    Raises:
        MpqError: a loss that adds up over samples, changes its batch, or does not run on the first one.
    """
    first, loss_fn = batches[0], careful(loss_fn)
    if _apart(model, first, loss_fn):
        return Samples(batches, loss_fn)
    _check_runs(model, first, loss_fn)
    if samples_in(first) == 1 or _is_random(model, first, loss_fn, warn):
        return Samples(batches, loss_fn)
    swaps = _second_dimensions(first)
    swapped, loss_of_swapped = tuple(_swapped(batch, swaps) for batch in batches), _on_swapped(loss_fn, swaps)
    if any(swaps) and _apart(model, swapped[0], loss_of_swapped, second=True):
        return Samples(swapped, loss_of_swapped, second=True)
    log.log(
        logging.WARNING if warn else logging.DEBUG,
        "the loss of a batch is not the mean of its samples' losses, as with contrastive losses and batch statistics, "
        "or a sample alone has no loss. Scores by sample are then approximate; the metrics "
        "'loss' and 'hessian' use whole batches",
    )
    return Samples(batches, loss_fn, together=True)


def _apart(model: nn.Module, batch: Batch, loss_fn: LossFn, second: bool = False) -> bool:
    """Whether single samples along the first dimension have their own losses and outputs."""
    for sample in range(min(TRIED, samples_in(batch))):
        once, _ = run_loss(model, take(batch, [sample]), loss_fn)
        twice, outputs = run_loss(model, take(batch, [sample, sample]), loss_fn)
        if once is None or twice is None:
            continue
        if once != 0 and abs(twice - 2 * once) <= TOLERANCE * abs(once):
            raise MpqError("the loss function returns a sum over the batch's samples: return their mean")
        alike = all(_repeats(output) or (second and _repeats(turned(output))) for output in outputs if output.ndim)
        return alike and abs(twice - once) <= TOGETHER * max(abs(once), abs(twice))
    return False


def run_loss(model: nn.Module, batch: Batch, loss_fn: LossFn) -> tuple[float | None, list[Tensor]]:
    """The loss, None where it cannot be computed, and the model's outputs."""
    with outputs_of(model) as outputs:
        try:
            loss = check_loss(loss_fn(model, batch), 0).item()
        except (ChangedBatchError, torch.OutOfMemoryError):
            raise
        except Exception:  # the user's code, which may raise anything
            loss = None
    return loss, [output.float() for output in outputs]


def _check_runs(model: nn.Module, batch: Batch, loss_fn: LossFn) -> None:
    """MpqError where the loss cannot be computed of the whole batch; what the model or the loss raises is its cause."""
    try:
        check_loss(loss_fn(model, batch), 0)
    except (MpqError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's code, which may raise anything
        raise MpqError(f"{type(model).__name__} does not run on calibration batch 0 ({summary(error)})") from error


def turned(output: Tensor) -> Tensor:
    """With the first two dimensions exchanged, where there are two."""
    return output.transpose(0, 1) if output.ndim > 1 else output


def _repeats(output: Tensor) -> bool:
    """Whether both halves of the outputs are the same."""
    return ends_with(output, output[: len(output) // 2], 2)


def ends_with(whole: Tensor, last: Tensor, count: int) -> bool:
    """Whether the outputs for `count` samples end with those for the last one alone; False for other shapes."""
    if whole.shape != (count * len(last), *last.shape[1:]):
        return False
    room = TOLERANCE * float(whole.abs().max())
    return torch.allclose(whole[len(whole) - len(last) :], last, rtol=TOLERANCE, atol=room)


def _is_random(model: nn.Module, batch: Batch, loss_fn: LossFn, warn: bool) -> bool:
    one, other = (run_loss(model, batch, loss_fn)[0] for _ in range(2))
    if one is None or other is None or math.isclose(one, other, rel_tol=TOLERANCE):
        return False
    level = logging.WARNING if warn else logging.DEBUG
    log.log(level, "the loss is random: the same batch loses %.4g, then %.4g; scores vary as much", one, other)
    return True


def _second_dimensions(batch: Batch) -> tuple[bool, ...]:
    """Which tensors, depth first, have the second dimension's length of the first one that has two."""
    tensors = tensors_in(batch)
    length = next((tensor.shape[1] for tensor in tensors if tensor.ndim > 1), None)
    return tuple(tensor.ndim > 1 and tensor.shape[1] == length for tensor in tensors)


def _swapped(batch: Batch, swaps: Sequence[bool]) -> Batch:
    """The batch with the first two dimensions exchanged in these tensors, counted depth first."""
    coming = iter(swaps)
    return mapped(batch, lambda tensor: tensor.transpose(0, 1) if next(coming, False) else tensor)


def _on_swapped(loss_fn: LossFn, swaps: Sequence[bool]) -> LossFn:
    @wraps(loss_fn)
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(model, _swapped(batch, swaps))

    return loss
