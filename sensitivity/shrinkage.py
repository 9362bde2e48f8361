"""Shrinkage of noisy scores towards those of similar layers nearby (empirical Bayes)."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpq.core.layer import Layer
from mpq.sensitivity.task import Scores

REACH = 2  # neighbours on each side
WEIGHTS = np.array([1.0, 2.0, 0.0, 2.0, 1.0])  # weights of neighbours by distance


def shrunk(layers: Sequence[Layer], scores: NDArray[np.float64], errors: NDArray[np.float64]) -> Scores:
    """Scores and standard errors (layers, schemes), each layer's drawn towards its neighbours in depth.

    Neighbours are layers of one shape whose names differ in numbers only, in the order of the model. In logarithms, of
    each scheme: a score y with relative error s, the weighted mean m of its neighbours with error s_m. The variance
    tau^2 of true scores around such means is the family's mean of (y - m)^2 less the part explained by errors. The
    score becomes the mean of y and m with weights 1 / s^2 and 1 / (tau^2 + s_m^2), which leaves it unchanged without
    noise. Scores of zero and those without error are unchanged.
    """
    scores, errors = scores.copy(), errors.copy()
    for family in _families(layers):
        if len(family) < 3:
            continue
        for column in range(scores.shape[1]):
            values, noise = scores[family, column], errors[family, column]
            if np.all(values > 0) and np.all(noise > 0):
                scores[family, column], errors[family, column] = _drawn(values, noise)
    return scores, errors


def _families(layers: Sequence[Layer]) -> list[list[int]]:
    families: dict[tuple[str, int, int], list[int]] = {}
    for place, layer in enumerate(layers):
        families.setdefault((re.sub(r"\d+", "#", layer.name), layer.rows, layer.cols), []).append(place)
    return list(families.values())


def _drawn(values: NDArray[np.float64], noise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = len(values)
    logs, variances = np.log(values), (noise / values) ** 2
    apart = np.arange(count)[None, :] - np.arange(count)[:, None]
    weights = np.where(np.abs(apart) <= REACH, WEIGHTS[np.clip(apart + REACH, 0, 2 * REACH)], 0.0)
    weights /= weights.sum(1, keepdims=True)
    means, mean_variances = weights @ logs, weights**2 @ variances
    tau = max(float(np.mean((logs - means) ** 2 - variances - mean_variances)), 0.0)
    prior = np.maximum(tau + mean_variances, np.finfo(float).tiny)
    share = prior / (prior + variances)  # weight of the score itself
    drawn = np.exp(share * logs + (1 - share) * means)
    return drawn, drawn * np.sqrt(share * variances)
