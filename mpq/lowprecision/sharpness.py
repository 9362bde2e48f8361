"""Sharpness of the loss in the last token's logits, an early sign of failing training (arXiv 2405.18710, Eq. 2).

Keskar et al. 2017 (arXiv 1609.04836, metric 2.1) with logits instead of weights: (largest loss within a box around the
logits - loss) / (1 + loss), in per cent.
"""

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from mpq.network.calibration import evaluating, logits_of

EPSILON = 5e-4


def logit_sharpness(model: nn.Module, tokens: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Sharpness of each sequence (batch,): the last of its tokens (batch, time) is the target of the one before."""
    with torch.no_grad(), evaluating(model):
        logits = logits_of(model(tokens[:, :-1]))[:, -1]
    return sharpness(logits, tokens[:, -1], epsilon)


def sharpness(logits: Tensor, targets: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Exact, in closed form: (samples, classes) and (samples,) to (samples,), in float64.

    Cross-entropy rises with every logit but the target's and falls with that one, so its maximum over the box
    |z_i| <= epsilon (|y_i| + 1) lies in the corner where all others are raised and the target is lowered.
    """
    logits = logits.double()
    radius = epsilon * (logits.abs() + 1)
    signs = 1 - 2 * functional.one_hot(targets, logits.shape[-1]).double()
    before = functional.cross_entropy(logits, targets, reduction="none")
    worst = functional.cross_entropy(logits + signs * radius, targets, reduction="none")
    return 100 * (worst - before) / (1 + before)


def sharpness_by_search(logits: Tensor, targets: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The same by L-BFGS-B from the box's centre, one sample at a time, as in the paper: slow, a local maximum."""
    maxima = [_search(row.double().numpy(), int(target), epsilon) for row, target in zip(logits, targets, strict=True)]
    return torch.tensor(maxima, dtype=torch.float64)


def _search(logits: np.ndarray, target: int, epsilon: float) -> float:
    radius = epsilon * (np.abs(logits) + 1)

    def negative_loss(moves: np.ndarray) -> tuple[float, np.ndarray]:
        moved = logits + moves
        shifted = np.exp(moved - moved.max())
        probabilities = shifted / shifted.sum()
        loss = float(np.log(shifted.sum()) + moved.max() - moved[target])
        probabilities[target] -= 1
        return -loss, -probabilities

    start = np.zeros_like(logits)
    before = -negative_loss(start)[0]
    bounds = list(zip(-radius, radius, strict=True))
    best = minimize(negative_loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15})
    return float(100 * (-best.fun - before) / (1 + before))
