"""Quality of a model on unseen data: accuracy or perplexity, its standard error, and each sample's part."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mpq.core.errors import MpqError
from mpq.network.calibration import (
    ELEMENTS,
    Batch,
    LossFn,
    check_batches,
    check_loss,
    evaluating,
    logits_of,
    next_token_loss,
    split_batch,
)
from mpq.network.distance import relative_distance
from mpq.network.samples import Samples, arranged
from mpq.network.shelf import Kept, Shelf
from mpq.network.storage import release_memory

KINDS = ("accuracy", "perplexity", "distance", "loss")
DIVERGE = KINDS[:2]  # kinds with logits, for which the divergence from the original is measured
IGNORED = -100  # the target of a position that predicts nothing
TOKENS = 2048  # processed at once by a language model
WIDE = 2**10  # classes; of more, the original's log-probabilities are kept in float16


@dataclass(frozen=True, eq=False)
class Divergence:
    """Divergence of predictions from the original model's, sample by sample."""

    kl: NDArray[np.float64]  # (samples,), mean KL(original || model) of each sample's predictions, nats
    agreement: NDArray[np.float64]  # (samples,), share of predictions whose top choice is the original's
    flips: NDArray[np.float64]  # (samples,), share of predictions that became right or wrong (arXiv 2407.09141)
    weights: NDArray[np.float64]  # (samples,), predictions of each
    quantile: float  # KL that 99 % of all predictions stay below

    def mean(self) -> tuple[float, float]:
        """Mean KL over predictions and its standard error."""
        return mean_and_error(self.kl, self.weights)

    def __str__(self) -> str:
        (kl, error), (same, same_error), (flips, flips_error) = self.mean(), self.agreeing(), self.flipping()
        return (
            f"KL from the original {kl:.4g} +- {error:.1g} (99 %: {self.quantile:.2g}), same top choice "
            f"{100 * same:.1f} % +- {100 * same_error:.1f}, flips {100 * flips:.1f} % +- {100 * flips_error:.1f}"
        )

    def agreeing(self) -> tuple[float, float]:
        """Share of predictions with the original's top choice, and its standard error."""
        return mean_and_error(self.agreement, self.weights)

    def flipping(self) -> tuple[float, float]:
        """Share of predictions that were right and are wrong, or the other way round, and its standard error."""
        return mean_and_error(self.flips, self.weights)


@dataclass(frozen=True, eq=False)
class Quality:
    """Measurements on `len(losses)` samples (sequences, for a language model)."""

    kind: str  # one of KINDS
    value: float  # share of right answers, exp(mean loss per token), distance relative to the outputs, or mean loss
    error: float  # standard error of the value, from the spread of the samples; NaN for a single one
    loss: float  # mean over samples, or over predicted tokens
    losses: NDArray[np.float64]  # (samples,), mean loss of each
    weights: NDArray[np.float64]  # (samples,), predicted tokens of each; ones for other models
    hits: NDArray[np.bool_] | None = None  # (samples,), right answers of a classifier
    divergence: Divergence | None = None  # where a reference was given, and for models that have logits

    def __str__(self) -> str:
        if self.kind == "accuracy":
            return f"accuracy {100 * self.value:.2f} % +- {100 * self.error:.2f}"
        return f"{self.kind} {self.value:.4g} +- {self.error:.2g}"

    def loss_above(self, reference: "Quality") -> tuple[float, float]:
        """Mean loss above the reference's on the same samples, and its standard error; pairing removes their spread.

        Raises:
            MpqError: measured on other samples.
        """
        self._check_samples(reference)
        return mean_and_error(self.losses - reference.losses, self.weights)

    @property
    def harm(self) -> NDArray[np.float64]:
        """(samples,): harm to each sample: KL from the original, or the loss without logits."""
        return self.losses if self.divergence is None else self.divergence.kl

    def harm_with_error(self) -> tuple[float, float]:
        """Mean harm over predictions and its standard error."""
        return mean_and_error(self.harm, self.weights)

    def harm_above(self, other: "Quality") -> tuple[float, float]:
        """Mean harm above another model's on the same samples, and its standard error; negative: this one is better.

        Raises:
            MpqError: measured on other samples.
        """
        self._check_samples(other)
        return mean_and_error(self.harm - other.harm, self.weights)

    def _check_samples(self, other: "Quality") -> None:
        if not np.array_equal(self.weights, other.weights):
            raise MpqError("two qualities can be compared only when they were measured on the same samples")


class Reference:
    """The original model's quality, and its log-probabilities of every prediction: float16 for large vocabularies."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], kind: str, loss_fn: LossFn | None = None,
        progress: bool = False, shelf: Shelf | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.samples = kind, _samples(model, check_batches(batches), kind, loss_fn)
        self._shelf, self._known = shelf or Shelf(), list[Kept]()
        self.quality = _evaluate(model, self.samples, kind, progress, self._keep)

    def _keep(self, part: int, log_probs: Tensor) -> Tensor:
        dtype = torch.float16 if log_probs.shape[-1] > WIDE else torch.float32
        self._known.append(self._shelf.keep(log_probs.to(dtype)))
        return log_probs

    def measure(self, model: nn.Module, progress: bool = False) -> Quality:
        """The quality of another model on the same batches, with its divergence from the original."""
        return _evaluate(model, self.samples, self.kind, progress, self._recall)

    def _recall(self, part: int, log_probs: Tensor) -> Tensor:
        return self._known[part]().to(log_probs.device).float().log_softmax(-1)  # normalized again after rounding


def evaluate(
    model: nn.Module, batches: Iterable[Batch], kind: str, loss_fn: LossFn | None = None, progress: bool = False
) -> Quality:
    """Measure a model in evaluation mode, without gradients; `Reference.measure` compares it with another one.

    Args:
        model: gives logits, or an object that has them: (batch, classes), or (batch, time, vocabulary).
        batches: (inputs, labels) for "accuracy"; tokens, as in `next_token_loss`, for "perplexity".
        kind: "accuracy", "perplexity", "distance" (batches of
            `mpq.network.distance.with_targets`), or "loss", which calls `loss_fn` for each sample, or for whole batches
            if single samples have no loss (`mpq.network.samples`).
        loss_fn: only for the kind "loss".
        progress: show a progress bar.

    Raises:
        MpqError: an unknown kind, empty or NaN data, a loss that is NaN or infinite (naming the batch).
    """
    return _evaluate(model, _samples(model, check_batches(batches), kind, loss_fn), kind, progress, None)


Known = Callable[[int, Tensor], Tensor]  # number of a part of the data, log-probabilities -> the original's


def _samples(model: nn.Module, batches: tuple[Batch, ...], kind: str, loss_fn: LossFn | None) -> Samples:
    """The batches as the kind takes them, samples first where it splits them.

    Raises:
        MpqError: an unknown kind, or the kind "loss" without a loss.
    """
    if kind not in KINDS or (kind == "loss" and loss_fn is None):
        raise MpqError(f"quality is one of {', '.join(KINDS)} (the last with a loss_fn), not {kind!r}")
    if kind != "loss" or loss_fn is None:
        return Samples(batches, loss_fn or next_token_loss)  # no loss is needed
    with evaluating(model):
        return arranged(model, batches, loss_fn, warn=False)


def _evaluate(model: nn.Module, samples: Samples, kind: str, progress: bool, known: Known | None) -> Quality:
    parts: list[_Part] = []
    with torch.no_grad(), evaluating(model):
        for index, batch in enumerate(
            tqdm(samples.batches, desc="evaluation", disable=None if progress else True, leave=False)
        ):
            if kind == "loss":
                singles = [batch] if samples.together else split_batch(batch)
                losses = torch.stack(
                    [check_loss(samples.loss_fn(model, single), index).reshape(()) for single in singles]
                )
                batch_parts = [_Part(losses, torch.ones_like(losses))]
            elif kind == "distance":
                losses, outputs = relative_distance(model, batch)
                batch_parts = [_Part(losses, torch.ones_like(losses), relative=losses / outputs)]
            else:
                batch_parts = []
                for logits, targets in _predictions(model, batch, kind):
                    batch_parts.append(_measure(logits, targets, known, len(parts) + len(batch_parts)))
            check_loss(torch.cat([part.losses for part in batch_parts]).mean(), index)
            parts += batch_parts
            release_memory()
    return _quality(kind, parts)


class _Part(NamedTuple):
    """Measurements of some samples: (samples,) each, but the KL of single predictions."""

    losses: Tensor
    weights: Tensor  # predictions of each
    hits: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None
    flips: Tensor | None = None
    single: Tensor | None = None  # (predictions,)
    relative: Tensor | None = None  # distance of each output


def _predictions(model: nn.Module, batch: Batch, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (samples, predictions, classes) and targets (samples, predictions), -100 for none, some samples each.

    Chunks are small enough that neither a vocabulary's logits nor their float32 copies are ever whole in memory.
    """
    if kind == "accuracy":
        inputs, labels = batch
        yield logits_of(model(inputs)).unsqueeze(1), labels.unsqueeze(1)
        return
    tokens, mask = batch, None
    if isinstance(batch, (tuple, list)):
        (tokens,) = batch
    elif isinstance(batch, Mapping):
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
    few = max(1, TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), few):
        part = slice(start, start + few)
        options = {} if mask is None else {"attention_mask": mask[part]}
        targets = tokens[part, 1:]
        if mask is not None:
            targets = targets.masked_fill(mask[part, 1:] == 0, IGNORED)
        logits = logits_of(model(tokens[part], **options))[:, :-1]
        samples = max(1, ELEMENTS // max(logits[0].numel(), 1))
        yield from zip(torch.split(logits, samples), torch.split(targets, samples), strict=True)


def _measure(logits: Tensor, targets: Tensor, known: Known | None, number: int) -> _Part:
    log_probs = logits.float().log_softmax(-1)
    counted = targets != IGNORED
    weights = counted.sum(1)
    each = weights.clamp(min=1)
    target_log_probs = log_probs.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    losses = -(target_log_probs.double() * counted).sum(1) / each
    right = log_probs.argmax(-1) == targets
    hits = (right & counted).sum(1) == weights
    if known is None:
        return _Part(losses, weights, hits)
    original = known(number, log_probs)
    kl = (original.exp() * (original - log_probs)).sum(-1)
    top = original.argmax(-1)
    same, flipped = top == log_probs.argmax(-1), (top == targets) != right
    mean_kl, agreement, flips = ((values.double() * counted).sum(1) / each for values in (kl, same, flipped))
    return _Part(losses, weights, hits, mean_kl, agreement, flips, kl[counted])


def _quality(kind: str, parts: Sequence[_Part]) -> Quality:
    def joined(name: str) -> NDArray[Any]:
        values: NDArray[Any] = torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
        return values

    losses, weights = joined("losses").astype(np.float64), joined("weights").astype(np.float64)
    divergence = None
    if parts[0].kl is not None:
        quantile = float(np.quantile(joined("single"), 0.99))
        divergence = Divergence(joined("kl"), joined("agreement"), joined("flips"), weights, quantile)
    loss, error = mean_and_error(losses, weights)
    if kind == "accuracy":
        hits = joined("hits")
        value, error = mean_and_error(hits.astype(np.float64), weights)
        return Quality(kind, value, error, loss, losses, weights, hits, divergence)
    if kind == "perplexity":
        value = math.exp(min(loss, 700.0))
        return Quality(kind, value, value * error, loss, losses, weights, None, divergence)
    if kind == "distance":
        return Quality(kind, *mean_and_error(joined("relative").astype(np.float64), weights), loss, losses, weights)
    return Quality(kind, loss, error, loss, losses, weights)


def mean_and_error(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Weighted mean and its standard error (that of a ratio of sums; the plain one for equal weights)."""
    total = weights.sum()
    mean = float((values * weights).sum() / total)
    if len(values) < 2:
        return mean, math.nan
    squares = float(((weights * (values - mean)) ** 2).sum())
    return mean, math.sqrt(squares * len(values) / (len(values) - 1)) / float(total)
