"""How good a model is on data it has not seen: accuracy or perplexity, its standard error, and each sample's part."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mpq.core.errors import MpqError
from mpq.network.calibration import (
    Batch,
    LossFn,
    check_batches,
    check_loss,
    evaluating,
    logits_of,
    split_batch,
)

KINDS = ("accuracy", "perplexity", "loss")


@dataclass(frozen=True, eq=False)
class Quality:
    """What was measured on `len(losses)` samples (sequences, for a language model)."""

    kind: str  # "accuracy", "perplexity" or "loss"
    value: float  # share of right answers, exp(mean loss per token), or the mean loss
    error: float  # standard error of the value, from the spread of the samples; NaN for a single one
    loss: float  # mean over samples, or over predicted tokens
    losses: NDArray[np.float64]  # (samples,), mean loss of each
    weights: NDArray[np.float64]  # (samples,), predicted tokens of each; ones for other models
    hits: NDArray[np.bool_] | None = None  # (samples,), right answers of a classifier

    def __str__(self) -> str:
        if self.kind == "accuracy":
            return f"accuracy {100 * self.value:.2f} % +- {100 * self.error:.2f}"
        return f"{self.kind} {self.value:.4g} +- {self.error:.2g}"

    def loss_above(self, reference: "Quality") -> tuple[float, float]:
        """Mean loss above the reference's on the same samples, and its standard error; pairing removes their spread.

        Raises:
            MpqError: measured on other samples.
        """
        if not np.array_equal(self.weights, reference.weights):
            raise MpqError("two qualities can be compared only when they were measured on the same samples")
        return _mean_and_error(self.losses - reference.losses, self.weights)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], kind: str, loss_fn: LossFn | None = None, progress: bool = False
) -> Quality:
    """Measure a model in evaluation mode, without gradients.

    Args:
        model: gives logits, or an object that has them: (batch, classes), or (batch, time, vocabulary).
        batches: (inputs, labels) for "accuracy"; tokens, as in `next_token_loss`, for "perplexity".
        kind: "accuracy", "perplexity", or "loss", which asks `loss_fn` for one sample after the other.
        loss_fn: only for the kind "loss".
        progress: show a progress bar.

    Raises:
        MpqError: an unknown kind, empty or NaN data, a loss that is NaN or infinite (naming the batch).
    """
    if kind not in KINDS or (kind == "loss" and loss_fn is None):
        raise MpqError(f"quality is one of {', '.join(KINDS)} (the last with a loss_fn), not {kind!r}")
    checked = check_batches(batches)
    losses, weights, hits = [], [], []
    with torch.no_grad(), evaluating(model):
        for index, batch in enumerate(tqdm(checked, desc="evaluation", disable=not progress, leave=False)):
            if kind == "accuracy":
                batch_losses, right = _classifier_losses(model, batch)
                hits.append(right.cpu().numpy())
            elif kind == "perplexity":
                batch_losses, tokens = _token_losses(model, batch)
                weights.append(tokens.cpu().numpy())
            else:
                assert loss_fn is not None
                batch_losses = torch.stack(
                    [check_loss(loss_fn(model, sample), index).reshape(()) for sample in split_batch(batch)]
                )
            check_loss(batch_losses.mean(), index)
            losses.append(batch_losses.double().cpu().numpy())
    all_losses = np.concatenate(losses)
    all_weights = np.concatenate(weights).astype(np.float64) if weights else np.ones(len(all_losses))
    loss, error = _mean_and_error(all_losses, all_weights)
    if kind == "accuracy":
        right_answers = np.concatenate(hits)
        value, error = _mean_and_error(right_answers.astype(np.float64), all_weights)
        return Quality(kind, value, error, loss, all_losses, all_weights, right_answers)
    if kind == "perplexity":
        value = math.exp(min(loss, 700.0))
        return Quality(kind, value, value * error, loss, all_losses, all_weights)
    return Quality(kind, loss, error, loss, all_losses, all_weights)


def _classifier_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs, labels = batch
    logits = logits_of(model(inputs)).float()
    return functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def _token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss per predicted token of each sequence, and how many tokens each predicts."""
    tokens, options = batch, {}
    if isinstance(batch, (tuple, list)):
        (tokens,) = batch
    elif isinstance(batch, Mapping):
        tokens = batch["input_ids"]
        options = {name: batch[name] for name in ("attention_mask",) if batch.get(name) is not None}
    targets = tokens[:, 1:]
    if options:
        targets = targets.masked_fill(options["attention_mask"][:, 1:] == 0, -100)
    logits = logits_of(model(tokens, **options))[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (batch, time - 1)
    predicted = (targets != -100).sum(1)
    return losses.sum(1) / predicted.clamp(min=1), predicted


def _mean_and_error(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Weighted mean and its standard error (that of a ratio of sums; the plain one for equal weights)."""
    total = weights.sum()
    mean = float((values * weights).sum() / total)
    if len(values) < 2:
        return mean, math.nan
    spread = float(((weights * (values - mean)) ** 2).sum())
    return mean, math.sqrt(spread * len(values) / (len(values) - 1)) / float(total)
