"""Ranking of measured configurations by a score: Spearman's correlation at the top, at fixed size, with intervals."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mpq.core.errors import MpqError
from mpq.proxies.benchmark import Benchmark

Array = NDArray[np.float64]
RATIOS = (1.0, 0.5, 0.2)  # shares of the rows, best by predicted score (EMQ's code)
MEASURES = ("spearman@100%", "spearman@50%", "spearman@20%", "at fixed size")


def spearman(left: Array, right: Array) -> Array:
    """Rank correlation along the last axis, ties averaged; 0 where one side is constant."""
    return _correlation(rankdata(left, axis=-1), rankdata(right, axis=-1))


def _correlation(left: Array, right: Array) -> Array:
    left = left - left.mean(-1, keepdims=True)
    right = right - right.mean(-1, keepdims=True)
    scale = np.sqrt((left * left).sum(-1) * (right * right).sum(-1))
    covariance = (left * right).sum(-1)
    return np.asarray(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0))


def partial_spearman(left: Array, right: Array, control: Array) -> Array:
    """Partial rank correlation of `left` and `right` given `control`, along the last axis.

    0 where `left` or `right` is a function of `control`.
    """
    ranks = [rankdata(values, axis=-1) for values in np.broadcast_arrays(left, right, control)]
    ab, ac, bc = (_correlation(ranks[i], ranks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    rest = (1 - ac**2) * (1 - bc**2)
    known = rest > 1e-12
    return np.where(known, (ab - ac * bc) / np.sqrt(np.where(known, rest, 1.0)), 0.0)


def rankings(losses: Array, quality: Array, sizes: Array) -> Array:
    """The four MEASURES of predicted losses against measured quality, (..., rows) -> (..., 4); 1 is perfect."""
    losses, quality, sizes = np.broadcast_arrays(losses, quality, sizes)
    columns = []
    order = np.argsort(losses, axis=-1, kind="stable")
    for ratio in RATIOS:
        count = max(2, round(ratio * losses.shape[-1]))
        top = order[..., :count]
        columns.append(spearman(-np.take_along_axis(losses, top, -1), np.take_along_axis(quality, top, -1)))
    return np.stack([*columns, partial_spearman(-losses, quality, sizes)], axis=-1)


def fitness(losses: Array, benchmark: Benchmark) -> float:
    """The mean of the four measures: EMQ's three ratios, and the correlation at fixed size."""
    return float(rankings(losses, benchmark.quality, benchmark.sizes.astype(np.float64)).mean())


def steady_fitness(losses: Array, benchmark: Benchmark) -> float:
    """The mean of the two measures over all rows: correlation, plain and at fixed size."""
    values = rankings(losses, benchmark.quality, benchmark.sizes.astype(np.float64))
    return float((values[0] + values[-1]) / 2)


def bootstrap(
    losses: Array,  # (rows,), or (proxies, rows)
    benchmark: Benchmark,
    draws: int = 1000,
    seed: int = 0,
) -> Array:
    """The measures on rows drawn with repetition, (..., draws, 4); the same rows for every proxy, so differences pair.

    Raises:
        MpqError: fewer than ten rows.
    """
    if len(benchmark) < 10:
        raise MpqError(f"too few rows for a bootstrap: expected at least 10, not {len(benchmark)}")
    rows = np.random.default_rng(seed).integers(0, len(benchmark), (draws, len(benchmark)))
    return rankings(losses[..., rows], benchmark.quality[rows], benchmark.sizes.astype(np.float64)[rows])


def interval(draws: NDArray[Any], level: float = 0.95) -> tuple[Array, Array]:
    """The middle `level` of bootstrap draws along the second axis from the end: (..., draws, 4) -> two of (..., 4)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=-2)
    return low, high
