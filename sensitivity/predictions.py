"""Predictions of a loss: the weight and target class of each, inferred from the loss function."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, check_gradient, logits_of, seeded, seeded_normal, with_logits

CHUNK = 2**20  # numbers of logits taken at a time
TOLERANCE = 1e-3  # tolerance when checking for cross-entropy; float32 errs by about 1e-6


class OtherLossError(MpqError):
    """A loss that is not cross-entropy of the model's logits."""


@dataclass(frozen=True)
class Predictions:
    """Cross-entropy as seen from the logits of one call of the model: (..., classes), or (samples, classes, ...)."""

    weights: Tensor  # (...), float64: each prediction's share of the loss; 0 where it is not asked for (padding)
    targets: Tensor  # (...), int64: target class; undefined where the weight is 0


def predictions(
    model: nn.Module, batch: Batch, loss_fn: LossFn, outputs: Sequence[Any] | None = None
) -> list[Predictions]:
    """Weights and targets of a batch, for every call of the model, inferred from `loss_fn`'s derivatives.

    With `outputs`, the model's outputs for this batch call by call, it does not run again. The loss is evaluated at
    random logits in place of the model's. There cross-entropy has the derivatives w (softmax - target) and the Hessian
    w (diag(p) - p p^T), both well conditioned, which give w and the target.

    Raises:
        MpqError: a loss of another form.
    """
    replaced: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        logits = logits_of(output)
        if not isinstance(logits, Tensor):
            kind = type(output).__name__
            raise MpqError(f"the model returns a {kind} without logits: return a tensor, or an object with .logits")
        if not logits.ndim:
            raise MpqError("the model returns its loss: give labels to a loss function of the model's logits instead")
        generator = seeded(0, "predictions", len(replaced))
        random = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits.device).requires_grad_()
        replaced.append(random)
        return with_logits(output, random)

    handle = model.register_forward_hook(hook)
    try:
        with torch.enable_grad(), replaying(model, outputs):
            loss = check_gradient(loss_fn(model, batch))
    finally:
        handle.remove()
    if not replaced:
        raise MpqError("the loss function must call the model and use its logits: take labels 'data'")
    return [_predictions(loss, logits) for logits in replaced]


@contextmanager
def replaying(model: nn.Module, outputs: Sequence[Any] | None) -> Iterator[None]:
    """Inside the block the model gives these outputs, call by call, without computing; nothing changes with None."""
    if outputs is None:
        yield
        return
    calls = iter(outputs)
    own = model.__dict__.get("forward")  # an instance attribute, if the user wrapped it
    model.forward = lambda *args, **options: next(calls)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def classes_last(logits: Tensor, weights: Tensor) -> Tensor:
    """Logits (..., classes) for the weights (...) of their predictions, from either position of the classes."""
    return logits if weights.shape == logits.shape[:-1] else logits.movedim(1, -1)


def _predictions(loss: Tensor, logits: Tensor) -> Predictions:
    """Classes are the last dimension, or else the second, as in segmentation."""
    slopes = torch.autograd.grad(loss, logits, retain_graph=True, materialize_grads=True)[0]
    seconds = logits.movedim(1, -1).shape if logits.ndim > 2 else logits.shape
    second = seconds[:-1] != logits.shape[:-1]  # where both could be, shapes do not tell which it is
    labels = _one_label_each(logits, slopes)
    if labels is None and second:
        labels = _one_label_each(logits.movedim(1, -1), slopes.movedim(1, -1))
        if labels is not None:
            return Predictions(*(tensor.reshape(seconds[:-1]) for tensor in labels))
    if labels is None:
        labels = _soft_labels(loss, logits)
    return Predictions(*(tensor.reshape(logits.shape[:-1]) for tensor in labels))


def _one_label_each(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weights and targets, (predictions,) each, where every slope is w (p - e_target) with w >= 0; else None."""
    weights, targets, missed, whole = [], [], 0.0, 0.0
    for logit, slope in _parts(logits, slopes):
        chances, slope = logit.double().softmax(-1), slope.double()
        target = slope.argmin(-1, keepdim=True)
        others = slope.sum(-1, keepdim=True) - slope.gather(-1, target)
        weight = others / (1 - chances.gather(-1, target)).clamp(min=torch.finfo(torch.float64).tiny)
        expected = (weight * chances).scatter_add(-1, target, -weight)
        missed += (slope - expected).square().sum().item()
        whole += slope.square().sum().item()
        weights.append(weight)
        targets.append(target)
    joined = torch.cat(weights)
    if missed > TOLERANCE**2 * whole or bool((joined < 0).any()) or not bool((joined > 0).any()):
        return None
    return joined, torch.cat(targets)


def _soft_labels(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and most likely targets by the loss's curvature, which is w (diag(p) - p p^T) whatever the labels are."""
    slopes = torch.autograd.grad(loss, logits, create_graph=True, retain_graph=True, materialize_grads=True)[0]
    vectors = seeded_normal(logits.shape, 0, "check").to(logits.device)
    curved = torch.zeros_like(logits)
    if slopes.requires_grad:
        curved = torch.autograd.grad(slopes, logits, vectors, retain_graph=True, materialize_grads=True)[0]
    weights, targets, missed, whole = [], [], 0.0, 0.0
    for logit, slope, vector, curve in _parts(logits, slopes, vectors, curved):
        chances = logit.double().softmax(-1)
        mean = (chances * vector).sum(-1, keepdim=True)
        expected = chances * (vector - mean)  # (diag(p) - p p^T) v
        weight = (curve * expected).sum(-1) / expected.square().sum(-1)
        missed += (curve - weight.unsqueeze(-1) * expected).square().sum().item()
        whole += curve.double().square().sum().item()
        weights.append(weight)
        targets.append((weight.unsqueeze(-1) * chances - slope).argmax(-1))
    joined = torch.cat(weights)
    fits = missed <= TOLERANCE**2 * whole
    if not fits or bool((joined < 0).any()) or not bool((joined > 0).any()):
        raise OtherLossError(
            "the loss is not cross-entropy of the model's logits: use labels 'data', or the metric 'loss'"
        )
    return joined, torch.cat(targets)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The predictions' vectors of tensors (..., classes), a few predictions at a time."""
    step = _step(tensors[0])
    rows = (tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors)
    return zip(*(torch.split(row, step) for row in rows), strict=True)


def _step(logits: Tensor) -> int:
    """Predictions taken at a time: vocabulary-sized numbers in float64 stand for a few of them alone."""
    return max(1, CHUNK // logits.shape[-1])


def random_slopes(
    logits: Tensor,  # (..., classes), or (samples, classes, ...)
    weights: Tensor,  # (...), or (samples, ...)
    generator: torch.Generator,
    flips: Tensor | None = None,  # as one sample of the logits
) -> Tensor:
    """Random d, as the logits, with E[d d^T] = w (diag(p) - p p^T), independent between predictions.

    d = sqrt(w) (sqrt(p) e - p (sqrt(p) . e)) with random signs e: all classes take part, which varies less than a
    label drawn from p. With `flips`, such as rows of an orthogonal design, the signs are e * flips.
    """
    if weights.shape != logits.shape[:-1]:
        turned = None if flips is None else flips.movedim(0, -1)
        return random_slopes(logits.movedim(1, -1), weights, generator, turned).movedim(-1, 1)
    asked = (
        weights > 0
    )  # predictions without weight, such as padding, use no random numbers, so that they do not change the others'
    signs = torch.ones(logits.shape, dtype=torch.int8)
    signs[asked.cpu()] = torch.randint(
        0, 2, (int(asked.sum()), logits.shape[-1]), generator=generator, dtype=torch.int8
    )
    signs = signs.to(logits.device)
    drawn = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    step = _step(logits)
    parts = (torch.split(tensor.reshape(-1, logits.shape[-1]), step) for tensor in (logits, signs, drawn))
    shares = torch.split(weights.flatten().to(logits.device), step)
    if flips is not None:
        flips = flips.to(signs.device).expand(logits.shape).reshape(-1, logits.shape[-1])
    for number, (logit, sign, into, share) in enumerate(zip(*parts, shares, strict=True)):
        roots = logit.double().softmax(-1).sqrt()
        signed_roots = roots * (sign * 2.0 - 1)
        if flips is not None:
            signed_roots = signed_roots * torch.split(flips, step)[number]
        slopes = signed_roots - roots.square() * signed_roots.sum(-1, keepdim=True)
        into.copy_(share.sqrt().unsqueeze(-1) * slopes)
    return drawn
