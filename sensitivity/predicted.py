"""Oracle metrics of predictions: measured divergence from the unquantized model, and wrong predictions."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.network.calibration import outputs_of
from mpq.sensitivity.loss import ByBatch, measured
from mpq.sensitivity.predictions import Predictions, classes_last, predictions
from mpq.sensitivity.task import Scores, Task


def divergence(task: Task) -> Scores:
    """Measured divergence KL(model || quantized) of the predictions, averaged with the loss's own weights.

    It needs no labels, is never negative, and does not reward errors that happen to help. The unquantized model's
    log-probabilities of all batches are kept in memory. The standard error is over batches.
    """
    asked = _asked(task)
    reference = [[logits.log_softmax(-1) for logits in _logits(task, index, each)] for index, each in enumerate(asked)]

    def measure(index: int, call: int, logits: Tensor) -> Tensor:
        known = reference[index][call]
        return (known.exp() * (known - logits.log_softmax(-1))).sum(-1)

    return _measured(task, measure, asked)


def wrong(task: Task) -> Scores:
    """Measured change of the share of wrong predictions (top-1), averaged with the loss's own weights.

    It moves in steps of one prediction, so small changes drown in the standard error, which is over batches.
    """

    def measure(index: int, call: int, logits: Tensor) -> Tensor:
        return (logits.argmax(-1) != asked[index][call].targets).double()

    asked = _asked(task)
    return _measured(task, measure, asked)


def _asked(task: Task) -> list[list[Predictions]]:
    return [predictions(task.model, batch, task.loss_fn) for batch in task.batches]


def _measured(task: Task, measure: Callable[[int, int, Tensor], Tensor], asked: list[list[Predictions]]) -> Scores:
    """Change of the weighted mean of `measure(batch, call, logits)`, one number for each prediction."""

    def by_batch() -> ByBatch:
        means = []
        for index, prediction in enumerate(asked):
            logits = _logits(task, index, prediction)
            total = sum(
                (part.weights * measure(index, call, logits[call]).double()).sum().item()
                for call, part in enumerate(prediction)
            )
            means.append(total / sum(part.weights.sum().item() for part in prediction))
            if not np.isfinite(means[-1]):
                raise MpqError(f"the predictions of calibration batch {index} are not finite")
        return np.array(means)

    return measured(task, by_batch)


@torch.no_grad()
def _logits(task: Task, index: int, asked: list[Predictions]) -> list[Tensor]:
    """Logits (..., classes) of each call on a batch."""
    with outputs_of(task.model) as outputs:
        task.loss_fn(task.model, task.batches[index])
    return [classes_last(logits.float(), part.weights) for logits, part in zip(outputs, asked, strict=True)]
