"""Learning rate and momentum from a Lanczos spectrum of the batch Hessian (Granziol et al., arXiv 2006.09092).

Extreme eigenvalues of the loss of a batch lie above those of all data, the more the smaller the batch, so the spectrum
is taken on the data of one step: the largest stable rate of SGD then grows in proportion to small batches. For Adam the
Hessian is scaled by the root of the squared gradients, as its steps are, and the rate grows with the batch's root.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.network.calibration import check_loss, seeded_normal
from mpq.sensitivity.graph import differentiable_twice
from mpq.sensitivity.lanczos import Lanczos
from mpq.sensitivity.products import Hessian

DAMPING = 1e-2  # lower bound of the curvature, relative to the largest eigenvalue
SHARE = 0.25  # share of the largest stable rate; grid searches find 1/2 to 1/8 of it best (tests/sensitivity)
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Rate:
    """A learning rate and momentum, and the curvature that they come from."""

    lr: float
    momentum: float
    largest: float  # eigenvalue of the (for Adam, scaled) batch Hessian
    smallest: float  # smallest positive eigenvalue, damped
    stable: float  # the largest rate with this momentum at which a quadratic of this curvature does not diverge

    def at_batch(self, ratio: float, optimizer: str) -> "Rate":
        """The rate for a batch so many times as large: in proportion for SGD, to the root for Adam."""
        factor = ratio if optimizer == "sgd" else math.sqrt(ratio)
        return Rate(
            self.lr * factor, self.momentum, self.largest / factor, self.smallest / factor, self.stable * factor
        )


def learning_rate(
    losses: Sequence[Callable[[], Tensor]],
    parameters: Sequence[Tensor],
    *,
    optimizer: str = "sgd",
    steps: int = 12,
    damping: float = DAMPING,
    beta: float = 0.9,
    seed: int = 0,
) -> Rate:
    """The rate that the curvature of one step's loss allows.

    With curvature between l and L, heavy-ball descent is fastest at momentum ((root L - root l) / (root L + root l))^2
    (Polyak 1964) and stable below the rate 2 (1 + momentum) / L; Adam's steps, whose momentum is a moving average,
    below 2 (1 + beta) / ((1 - beta) L) with L of the scaled Hessian (Cohen et al., arXiv 2207.14484). The rate is a
    share of the stable one, for gradients are noisy and curvature grows on the way.

    Args:
        losses: each gives the mean loss of one step's data, differentiable twice; the first has its spectrum taken,
            all of them give Adam's squared gradients.
        parameters: what is trained.
        optimizer: "sgd" or "adam".
        steps: Lanczos steps.
        damping: share of the largest eigenvalue that is the least curvature, and of the mean root of squared gradients
            that Adam's denominators have at least.
        beta: Adam's first decay.
        seed: of the start vector.

    Raises:
        NotFiniteError: a loss that is NaN or infinite.
        MpqError: an unknown optimizer, or a loss without positive curvature.
    """
    if optimizer not in OPTIMIZERS:
        raise MpqError(f"unknown optimizer {optimizer!r}: expected adam or sgd")
    scale = _adam_scale(losses, parameters, damping) if optimizer == "adam" else None
    sizes = [parameter.numel() for parameter in parameters]
    start = seeded_normal(sum(sizes), seed, "learning rate").to(parameters[0].device)
    lanczos = Lanczos(start)
    with differentiable_twice():
        curvature = Hessian(check_loss(losses[0](), 0), (), parameters)
        for _ in range(min(steps, len(start))):
            if lanczos.exhausted:
                break
            vector = lanczos.direction if scale is None else lanczos.direction * scale
            parts = [part.view_as(one) for part, one in zip(torch.split(vector, sizes), parameters, strict=True)]
            product = torch.cat([part.float().flatten() for part in curvature.product(parts)])
            lanczos.take(product if scale is None else product * scale)
    return _rate(lanczos.ritz()[0].tolist(), optimizer, damping, beta)


def _rate(eigenvalues: Sequence[float], optimizer: str, damping: float, beta: float) -> Rate:
    largest = max(eigenvalues)
    if largest <= 0:
        raise MpqError("the loss has no positive curvature at this start: give a learning rate")
    smallest = max(min(value for value in eigenvalues if value > 0), damping * largest)
    if optimizer == "adam":
        stable = 2 * (1 + beta) / ((1 - beta) * largest)
        return Rate(SHARE * stable, beta, largest, smallest, stable)
    root = math.sqrt(largest / smallest)
    momentum = ((root - 1) / (root + 1)) ** 2
    stable = 2 * (1 + momentum) / largest
    return Rate(SHARE * stable, momentum, largest, smallest, stable)


def _adam_scale(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Tensor], damping: float) -> Tensor:
    """1 / root of Adam's denominators, flat."""
    count = sum(parameter.numel() for parameter in parameters)
    squares = torch.zeros(count, device=parameters[0].device, dtype=torch.float32)
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
        squares += torch.cat([one.float().flatten() for one in gradients]).square() / len(losses)
    roots = squares.sqrt()
    return (roots + damping * roots.mean()).clamp(min=1e-12).rsqrt()
