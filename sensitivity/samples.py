"""Checks of metrics' assumptions: independent samples along the first dimension, and a mean loss."""

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, check_loss, outputs_of, samples_in, take

TOLERANCE = 1e-3  # relative; float32 errs by about 1e-6


@torch.no_grad()
def check_mean(model: nn.Module, batch: Batch, loss_fn: LossFn) -> None:
    """MpqError when the loss adds up over samples: the first sample given twice then loses double.

    A model or loss that does not take so few samples is not asked.
    """
    try:
        once, twice = (check_loss(loss_fn(model, take(batch, few)), 0).item() for few in ([0], [0, 0]))
    except (ArithmeticError, IndexError, MpqError, RuntimeError, TypeError, ValueError):
        return
    if once != 0 and abs(twice - 2 * once) <= TOLERANCE * abs(once):
        raise MpqError("the loss function returns a sum over the batch's samples: return their mean")


@torch.no_grad()
def check_independent(model: nn.Module, batch: Batch, loss_fn: LossFn, index: int) -> None:
    """MpqError when batch `index` cannot be split: its last sample alone has other outputs than among the others.

    So it is where the first dimension is time, or where samples are compared with each other. A model whose outputs are
    not seen is not asked.
    """
    samples = samples_in(batch)
    whole, alone = (_outputs(model, part, loss_fn) for part in (batch, take(batch, [samples - 1])))
    for together, single in zip(whole, alone, strict=False):
        if together.shape != (samples * len(single), *single.shape[1:]) or not torch.allclose(
            together[-len(single) :], single, rtol=TOLERANCE, atol=TOLERANCE * float(together.abs().max())
        ):
            raise MpqError(
                f"the samples of calibration batch {index} depend on each other: its last one alone gives other "
                "outputs; put samples, not time, first in every tensor, or take a metric that only measures, 'loss'"
            )


def _outputs(model: nn.Module, batch: Batch, loss_fn: LossFn) -> list[Tensor]:
    with outputs_of(model) as outputs:
        loss_fn(model, batch)
    return [output.float() for output in outputs]
