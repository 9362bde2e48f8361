"""Curvature of the KL divergence from the float model, summed coherently over positions that share a label."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import first_samples, outputs_of
from mpq.sensitivity.backward import Labels
from mpq.sensitivity.by_input import input_scores
from mpq.sensitivity.by_position import position_scores
from mpq.sensitivity.derivatives import loss_predictions
from mpq.sensitivity.predictions import OtherLossError, Predictions
from mpq.sensitivity.rows import Mixed, with_mixes
from mpq.sensitivity.shrinkage import shrunk
from mpq.sensitivity.task import RowScores, Scores, Task, by_layer

log = logging.getLogger(__name__)

DOUBT = (
    0.02  # mean of 1 - the largest probability; CIFAR ResNets: 0.016 to 0.03 on unseen images, 0.0003 on training ones
)
HOTTEST = 64.0
SAMPLES = 64
POSITIONS = 2**13  # used by an estimate by position: 32 texts of 256 tokens
ESTIMATES = ("auto", "position", "input")


def kl_curvature(
    task: Task,
    *,
    estimate: str = "auto",
    labels: str = "auto",
    draws: int = 2,
    temperature: float | None = None,
    shrink: bool = True,
) -> Scores:
    """Predicted KL divergence from the float model, 1/2 dw F dw^T, of every layer and scheme, row by row.

    F is the Fisher information with labels drawn from the model's own predictions, which is the divergence's Hessian at
    the float point. Errors of different rows count as independent. Within a row there are two estimates:

    - "input": one label stands for a whole input (images, sentences). Half the mean over inputs n of (dw_r . G_nr)^2,
      G_n the gradient of the weight, summed over the positions of input n before it is squared, as the errors of these
      positions add up in one prediction. Unbiased; the standard error is over inputs.
    - "position": every position t has a label (language models). 1/2 dw_r H dw_r^T s_r, with H the mean of |g_t|^2
      x_t x_t^T, the inputs' second moment weighted by the squared gradient of the output at the same position, and
      s_r row r's share of the squared gradients. Against the form above, positions count as independent and H is the
      same for all rows; it has so much less noise that the first POSITIONS of the data are enough. Inputs that no
      gradient meets cost nothing, however large, and positions that outweigh the others are taken one by one. The
      standard error is that of the mean of |g_t|^2 |x_t|^2, over sequences.

    What a scheme's activation format costs is added: the same form of W (Q(x) - x), rows summed before squaring.
    Both are on the scale of the loss and predictions of weight 0 (padding, ignored labels) take no part. Batches pass
    in pieces of whole samples that fit the memory, each piece's loss being the mean of its own samples.

    Args:
        task: model, data, layers and schemes.
        estimate: "position", "input", or "auto": "position" where a sample of the first batch has several predictions.
        labels: "model", "data", or "auto": the model's where the loss is cross-entropy of the logits, else the data's,
            said in the log.
        draws: of labels; with the model's labels and the estimate "input" alone more than one.
        temperature: of the predictions that labels are drawn from, with the estimate "input"; left out, see `softness`.
        shrink: whether scores are drawn towards those of their neighbours, see `mpq.sensitivity.shrinkage.shrunk`.

    Raises:
        MpqError: an unknown estimate, or labels "model" for a loss other than cross-entropy.
    """
    rows = row_scores(task, estimate=estimate, labels=labels, draws=draws, temperature=temperature)

    def numbers(layer: Layer) -> Sequence[float]:
        scores, _, errors = rows(layer)
        pairs: list[float] = np.stack([scores.sum(0).numpy(), errors.numpy()], 1).flatten().tolist()
        return pairs

    scores = by_layer(task, numbers, "scores")
    return shrunk(task.layers, *scores) if shrink else scores


def kl_curvature_by_rows(task: Task, mixes: Sequence[Scheme], *, shrink: bool = True, **options: Any) -> Mixed:
    """The scores of `kl_curvature`, with its options, and those of mixes of the task's schemes by rows."""
    return with_mixes(task, row_scores(task, **options), mixes, shrink)


def row_scores(
    task: Task, *, estimate: str = "auto", labels: str = "auto", draws: int = 2, temperature: float | None = None
) -> RowScores:
    """The scores of `kl_curvature` row by row, as they are and tempered, not shrunk: a function of the layer."""
    if estimate not in ESTIMATES:
        raise MpqError(f"unknown estimate {estimate!r}: expected one of {', '.join(ESTIMATES)}")
    if labels not in ("auto", "data", "model"):
        raise MpqError(f"unknown labels {labels!r}: expected auto, data or model")
    asked = None
    if labels == "auto" or estimate == "auto":
        asked = loss_predictions(task, task.few_samples(1))
    if labels == "auto" and asked is not None:
        try:
            return _rows(task, estimate, "model", draws, temperature, asked)
        except OtherLossError as error:  # what one sample did not show
            log.warning("gradients are of the data's own labels: %s", error)
            asked = None
    return _rows(task, estimate, "data" if labels == "auto" else labels, draws, temperature, asked)


def _rows(
    task: Task, estimate: str, labels: str, draws: int, temperature: float | None, asked: list[Predictions] | None
) -> RowScores:
    if estimate == "auto":
        estimate = "position" if asked is not None and _several(task, asked) else "input"
    if estimate == "position":
        return position_scores(_enough(task, asked), Labels(labels))
    if labels == "data":
        return input_scores(task, Labels(labels))
    return input_scores(task, Labels(labels, draws, softness(task) if temperature is None else temperature))


@torch.no_grad()
def softness(task: Task) -> float:
    """The temperature, usually 1, at which the model's mean uncertainty on the first batch is at least DOUBT.

    A more certain network has most likely been trained on these samples. The curvature of its predictions there is many
    times smaller than on unseen data.
    """
    with outputs_of(task.model) as outputs:
        task.loss_fn(task.model, task.few_samples(SAMPLES))
    logits = torch.cat([each.float().reshape(-1, each.shape[-1]) for each in outputs])
    low, high = 1.0, HOTTEST

    def doubt(temperature: float) -> float:
        return 1.0 - (logits / temperature).softmax(-1).amax(-1).mean().item()

    if doubt(low) >= DOUBT:
        return 1.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if doubt(middle) >= DOUBT else (middle, high)
    log.info("the model is almost certain of all samples, as of its training data: temperature %.3g is used", high)
    return high


def _enough(task: Task, asked: list[Predictions] | None) -> Task:
    """The task with its first samples only, as many as have POSITIONS predictions."""
    each = sum(int((one.weights > 0).sum()) for one in asked or [])
    if not each:
        return task
    if task.together:
        return replace(task, batches=task.batches[: math.ceil(POSITIONS / each)])
    return replace(task, batches=first_samples(task.batches, math.ceil(POSITIONS / each)))


def _several(task: Task, asked: list[Predictions]) -> bool:
    """Whether a sample has several predictions; `asked` are those of `few_samples(1)`."""
    if not task.together:
        return any(int((one.weights > 0).sum()) > 1 for one in asked)
    counts: list[Tensor] = [(one.weights > 0).flatten(1).sum(1) for one in asked if one.weights.ndim > 1]
    return any(bool((count > 1).any()) for count in counts)
