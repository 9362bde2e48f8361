"""What a loss asks of a model's outputs: which predictions count how much, which classes are right."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, logits_of, seeded

TOLERANCE = 1e-3  # of the check that a loss is cross-entropy; float32 errs by about 1e-6


@dataclass(frozen=True)
class Predictions:
    """Cross-entropy as seen from the logits (..., classes) of one call of the model."""

    weights: Tensor  # (...), float64: each prediction's share of the loss; 0 where it is not asked for (padding)
    targets: Tensor  # (...), int64: the class the loss wants; without meaning where the weight is 0


def predictions(model: nn.Module, batch: Batch, loss_fn: LossFn) -> list[Predictions]:
    """Weights and targets of a batch, for every call of the model: what `loss_fn` alone knows, found by asking it.

    The loss is taken at random logits in place of the model's. There cross-entropy has the derivatives
    w (softmax - target) and the Hessian w (diag(p) - p p^T), both well conditioned, which give w and the target.

    Raises:
        MpqError: a loss of another form.
    """
    replaced: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        logits = logits_of(output)
        generator = seeded(0, "predictions", len(replaced))
        random = torch.randn(logits.shape, generator=generator).to(logits.device).requires_grad_()
        replaced.append(random)
        if output is logits:
            return random
        output.logits = random
        return output

    handle = model.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            loss = loss_fn(model, batch)
    finally:
        handle.remove()
    if not replaced:
        raise MpqError("the loss function must call the model and use its logits: take labels 'data'")
    return [_predictions(loss, logits) for logits in replaced]


def _predictions(loss: Tensor, logits: Tensor) -> Predictions:
    slopes = torch.autograd.grad(loss, logits, create_graph=True, retain_graph=True, materialize_grads=True)[0]
    vectors = torch.randn(logits.shape, generator=seeded(0, "check")).to(logits.device)
    curved = torch.zeros_like(logits)
    if slopes.requires_grad:
        curved = torch.autograd.grad(slopes, logits, vectors, retain_graph=True, materialize_grads=True)[0]
    chances = logits.detach().double().softmax(-1)
    mean = (chances * vectors.double()).sum(-1, keepdim=True)
    expected = chances * (vectors.double() - mean)  # (diag(p) - p p^T) v
    weights = (curved.double() * expected).sum(-1) / expected.square().sum(-1)
    missed = (curved.double() - weights.unsqueeze(-1) * expected).norm().item()
    fits = missed <= TOLERANCE * curved.double().norm().item()
    if not fits or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise MpqError("this wants a loss that is cross-entropy of the model's logits: take labels 'data', or 'loss'")
    targets = (weights.unsqueeze(-1) * chances - slopes.detach().double()).argmax(-1)
    return Predictions(weights, targets)


def random_slopes(
    logits: Tensor,  # (..., classes)
    weights: Tensor,  # (...)
    generator: torch.Generator,
    flips: Tensor | None = None,  # (..., classes), of one sample
) -> Tensor:
    """Random d (..., classes) with E[d d^T] = w (diag(p) - p p^T), independent between predictions.

    d = sqrt(w) (sqrt(p) e - p (sqrt(p) . e)) with random signs e: all classes take part, which varies less than a
    label drawn from p. With `flips`, such as rows of an orthogonal design, the signs are e * flips.
    """
    roots = logits.double().softmax(-1).sqrt()
    signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8).to(logits.device) * 2.0 - 1
    if flips is not None:
        signs = signs * flips.to(signs.device)
    spread = roots * signs
    slopes = spread - roots.square() * spread.sum(-1, keepdim=True)
    return (weights.sqrt().unsqueeze(-1) * slopes).to(logits.dtype)
