"""Formats within a layer: which row takes which format of a mix, and what the mix then costs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.layer import Layer
from mpq.core.mix import digits, families, mix_of
from mpq.core.scheme import Scheme
from mpq.sensitivity.shrinkage import shrunk
from mpq.sensitivity.task import RowScores, Scores, Task

STEP = 0.25  # bits from one mix to the next,
COARSE = 5.0  # twice that from here on
MARGINAL = 32  # rows, those that lose least by another format, whose formats make up the exact number of bytes
HELD = 12  # digits of one number in the journal
TEMPER = 0.5  # exponent of rows' shares where rows of one layer are compared
FLOOR = 0.01  # of the mean share, added to each before that
TOKENS_FLOOR = 1.0  # the same of an embedding's tokens: few of them come often enough in some samples to be told apart

Array = NDArray[np.float64]
Places = NDArray[np.uint8]


@dataclass(frozen=True)
class Mixed:
    """Scores with those of mixes behind them, and the mixes' assignments by layer and scheme."""

    schemes: tuple[Scheme, ...]
    scores: Scores
    assignments: dict[str, dict[str, str]]


def tempered(shares: Tensor, exponent: float, floor: float = FLOOR) -> Tensor:
    """Shares along the last dimension, lifted by a floor in units of their mean, to a power, rescaled to the same sum.

    Rows that matter little to the float model are not that harmless once all is rounded: the gradient at the float
    point tells rows apart by more than the loss does. An exponent of 1 leaves the shares as they are.
    """
    if exponent == 1.0:
        return shares
    powers = (shares + floor * shares.mean(-1, keepdim=True)) ** exponent
    sums = powers.sum(-1, keepdim=True).clamp(min=torch.finfo(powers.dtype).tiny)
    return powers * (shares.sum(-1, keepdim=True) / sums)


def ladder(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Mixes of each family of formats among the schemes, STEP bits apart, between the smallest and the largest."""
    found = []
    for activation in dict.fromkeys(scheme.activation for scheme in schemes):
        for family in families([scheme.weight for scheme in schemes if scheme.activation == activation]):
            bits = [format.effective_bits() for format in family]
            found += [Scheme(mix_of(family, point), activation) for point in _points(min(bits), max(bits))]
    return tuple(found)


def _points(low: float, high: float) -> Iterator[float]:
    for count in range(math.floor(low / STEP) + 1, math.ceil(high / STEP)):
        if count * STEP <= COARSE or count % 2 == 0:
            yield count * STEP


def with_mixes(task: Task, rows: RowScores, mixes: Sequence[Scheme], shrink: bool = False) -> Mixed:
    """Scores of the task's schemes, sums of their rows', and of the mixes.

    A layer's score in a format is shared out to its rows by their tempered scores. A mix's rows take the formats of
    least cost that come to its bytes, by one multiplier a layer, and the mix costs the sum of their shares; layers'
    scores are `shrunk` before that where asked for. NaN is the score of a mix that is none in a layer of few or short
    rows.
    """
    columns = [[task.schemes.index(replace(mix, weight=part)) for part in mix.weight.members] for mix in mixes]
    plain, most = len(task.schemes), max((len(part) for part in columns), default=0)

    def numbers(layer: Layer) -> list[float]:
        scores, tempered, errors = (part.numpy() for part in rows(layer))
        sums, totals = scores.sum(0), tempered.sum(0)
        costs = tempered * np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)
        shares, places = np.zeros((len(mixes), most)), np.zeros((len(mixes), layer.rows), dtype=np.int64)
        for number, (mix, part) in enumerate(zip(mixes, columns, strict=True)):
            assert mix.mix is not None
            if mix.mix.suits(layer.rows, layer.cols):
                total = mix.mix.nbytes(layer.rows, layer.cols) - mix.mix.assignment_bytes(layer.rows)
                places[number] = assign(costs[:, part], mix.mix.row_bytes(layer.cols), total)
                for place, column in enumerate(part):
                    share = costs[places[number] == place, column].sum() / max(sums[column], np.finfo(float).tiny)
                    shares[number, place] = share
        pairs: list[float] = np.stack([sums, errors], 1).flatten().tolist()
        return [*pairs, *shares.flatten().tolist(), *_condensed(places)]

    items = {layer.name: layer for layer in task.layers}
    found = task.numbers(items, lambda layers: (numbers(layer) for layer in task.track(layers, "mixes")))
    count, scores = len(task.layers), np.array([row[: 2 * plain] for row in found]).reshape(-1, plain, 2)
    values, errors = (np.full((count, plain + len(mixes)), np.nan) for _ in range(2))
    whole = scores[..., 0], scores[..., 1]
    values[:, :plain], errors[:, :plain] = shrunk(task.layers, *whole) if shrink else whole
    assignments: dict[str, dict[str, str]] = {layer.name: {} for layer in task.layers}
    for i, (layer, row) in enumerate(zip(task.layers, found, strict=True)):
        shares = np.array(row[2 * plain : 2 * plain + len(mixes) * most]).reshape(len(mixes), most)
        places = _expanded(row[2 * plain + len(mixes) * most :], len(mixes), layer.rows)
        for j, (mix, part) in enumerate(zip(mixes, columns, strict=True)):
            if mix.mix is not None and mix.mix.suits(layer.rows, layer.cols):
                values[i, plain + j] = shares[j, : len(part)] @ values[i, part]
                errors[i, plain + j] = shares[j, : len(part)] @ errors[i, part]
                assignments[layer.name][mix.name] = digits(places[j])
    return Mixed((*task.schemes, *mixes), (values, errors), assignments)


def assign(costs: Array, sizes: Sequence[int], total: int) -> Places:
    """The format of each row, (rows,), of least summed cost that takes exactly `total` bytes.

    The optimum by one multiplier between bytes and costs; the rows that lose least by another format make up what is
    left, by dynamic programming over the bytes. Where they cannot, the rows that gain most take the larger of the two
    formats next to the average, which always comes to the bytes of a mix.

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
    """About the least price of a byte at which the rows take no more than the total."""
    steps = np.diff(np.unique(sizes))
    high = 2 * float(np.ptp(costs, axis=1).max(initial=0.0)) / float(steps.min()) + float(np.finfo(float).tiny)
    low = 1e-15 * high
    for _ in range(50):
        middle = math.sqrt(low * high)
        taken = int(sizes[(costs + middle * sizes).argmin(1)].sum())
        low, high = (low, middle) if taken <= total else (middle, high)
    return high


def _exactly(costs: Array, sizes: NDArray[np.int64], total: int) -> NDArray[np.intp] | None:
    """The formats of a few rows of least summed cost that take exactly so many bytes; None when nothing does."""
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


def _condensed(places: NDArray[np.int64]) -> list[float]:
    """Digits (mixes, rows) as numbers that a float holds exactly."""
    parts = [places[start : start + HELD] for start in range(0, len(places), HELD)]
    return [float(number) for part in parts for number in (10 ** np.arange(len(part))) @ part]


def _expanded(numbers: Sequence[float], mixes: int, rows: int) -> Places:
    """The inverse of `_condensed`."""
    held = np.array(numbers, dtype=np.int64).reshape(-1, 1, rows)
    return (held // 10 ** np.arange(HELD)[:, None] % 10).reshape(-1, rows)[:mixes].astype(np.uint8)
