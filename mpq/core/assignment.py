"""Assigning the formats of a mix to the rows of a layer."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpq.core.mix import Mix

MARGINAL = 32  # rows, the cheapest to change, whose formats are changed to reach the exact number of bytes

Array = NDArray[np.float64]
Places = NDArray[np.uint8]


def random_assignment(mix: Mix, rows: int, cols: int, seed: int = 0) -> Mix:
    """The mix with a random assignment that uses all of its formats, for timing and testing kernels."""
    costs = np.random.default_rng(seed).random((rows, len(mix.formats)))
    total = mix.nbytes(rows, cols) - mix.assignment_bytes(rows)
    return mix.with_assignment(assign(costs, mix.row_bytes(cols), total))


def assign(costs: Array, sizes: Sequence[int], total: int) -> Places:
    """The format of each row, (rows,), of least summed cost that takes exactly `total` bytes.

    A Lagrange multiplier on bytes gives the optimum up to a remainder of bytes, which the rows that are cheapest to
    change make up by dynamic programming. If they cannot, only the two formats next to the average are used, the larger
    one in the rows that gain most from it; this always reaches the total of a mix.

    Args:
        costs: of each row in each format, (rows, formats).
        sizes: bytes of a row in each format.
        total: bytes of all rows, a total that two neighbouring formats reach.
    """
    weights = np.asarray(sizes, dtype=np.int64)
    multiplier = _multiplier(costs, weights, total)
    priced = costs + multiplier * weights
    places = priced.argmin(1)
    left = total - int(weights[places].sum())
    if left == 0:
        return np.asarray(places, dtype=np.uint8)
    regrets = np.partition(priced, 1, axis=1)[:, 1] - priced.min(1)
    marginal = np.argsort(regrets, kind="stable")[:MARGINAL]
    exact = _exactly(costs[marginal], weights, left + int(weights[places[marginal]].sum()))
    if exact is None:
        return _two(costs, weights, total)
    places[marginal] = exact
    return np.asarray(places, dtype=np.uint8)


def _multiplier(costs: Array, sizes: NDArray[np.int64], total: int) -> float:
    """Approximately the smallest multiplier (cost of a byte) at which the rows take at most `total` bytes."""
    steps = np.diff(np.unique(sizes))
    high = 2 * float(np.ptp(costs, axis=1).max(initial=0.0)) / float(steps.min()) + float(np.finfo(float).tiny)
    low = 1e-15 * high
    for _ in range(50):
        middle = math.sqrt(low * high)
        taken = int(sizes[(costs + middle * sizes).argmin(1)].sum())
        low, high = (low, middle) if taken <= total else (middle, high)
    return high


def _exactly(costs: Array, sizes: NDArray[np.int64], total: int) -> NDArray[np.intp] | None:
    """The formats of a few rows with the least summed cost at exactly `total` bytes; None if there are none."""
    smallest = int(sizes.min())
    unit = int(np.gcd.reduce(sizes - smallest))
    room, rest = divmod(total - len(costs) * smallest, unit)
    steps = ((sizes - smallest) // unit).tolist()
    if rest or not 0 <= room <= len(costs) * max(steps):
        return None
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(costs), room + 1), dtype=np.intp)
    for row, own in enumerate(costs):
        options = np.full((len(steps), room + 1), np.inf)
        for place, step in enumerate(steps):
            if step <= room:
                options[place, step:] = best[: room + 1 - step] + own[place]
        taken[row] = options.argmin(0)
        best = options.min(0)
    if not np.isfinite(best[room]):
        return None
    places = np.zeros(len(costs), dtype=np.intp)
    for row in reversed(range(len(costs))):
        places[row] = taken[row, room]
        room -= steps[places[row]]
    return places


def _two(costs: Array, sizes: NDArray[np.int64], total: int) -> Places:
    rows, order = len(costs), np.argsort(sizes, kind="stable")
    low = max((place for place in order if sizes[place] * rows <= total), key=lambda place: int(sizes[place]))
    high = next(place for place in order if sizes[place] > sizes[low])
    raised = (total - rows * int(sizes[low])) // int(sizes[high] - sizes[low])
    gains = costs[:, low] - costs[:, high]
    places = np.full(rows, low, dtype=np.uint8)
    places[np.argsort(-gains, kind="stable")[:raised]] = high
    return places
