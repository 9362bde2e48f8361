"""Mixes of formats by rows: their candidates, assignments and scores."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.assignment import assign
from mpq.core.layer import Layer
from mpq.core.mix import digits, families, mix_of
from mpq.core.scheme import Scheme
from mpq.sensitivity.shrinkage import shrunk
from mpq.sensitivity.task import RowScores, Scores, Task

STEP = 0.25  # bits from one mix to the next,
COARSE = 5.0  # twice that from here on
HELD = 12  # digits of one number in the journal
TEMPER = 0.5  # exponent of rows' shares where rows of one layer are compared
FLOOR = 0.01  # share of the mean that is added to each before that
TOKENS_FLOOR = 1.0  # the same for an embedding's tokens, most of which are too rare in a few samples to be compared

Array = NDArray[np.float64]
Places = NDArray[np.uint8]


@dataclass(frozen=True)
class Mixed:
    """Scores with those of mixes appended, and the mixes' assignments by layer and scheme."""

    schemes: tuple[Scheme, ...]
    scores: Scores
    assignments: dict[str, dict[str, str]]


def tempered(shares: Tensor, exponent: float, floor: float = FLOOR) -> Tensor:
    """Shares along the last dimension, lifted by a floor in units of their mean, to a power, rescaled to the same sum.

    Gradients at the float model overstate the differences between rows in the loss of a rounded model, so shares are
    compressed. An exponent of 1 leaves them unchanged.
    """
    if exponent == 1.0:
        return shares
    powers = (shares + floor * shares.mean(-1, keepdim=True)) ** exponent
    sums = powers.sum(-1, keepdim=True).clamp(min=torch.finfo(powers.dtype).tiny)
    return powers * (shares.sum(-1, keepdim=True) / sums)


def ladder(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Mixes of each family of formats among the schemes, STEP bits apart, between the smallest and the largest."""
    mixes = []
    for activation in dict.fromkeys(scheme.activation for scheme in schemes):
        for family in families([scheme.weight for scheme in schemes if scheme.activation == activation]):
            bits = [format.effective_bits() for format in family]
            mixes += [Scheme(mix_of(family, point), activation) for point in _points(min(bits), max(bits))]
    return tuple(mixes)


def _points(low: float, high: float) -> Iterator[float]:
    for count in range(math.floor(low / STEP) + 1, math.ceil(high / STEP)):
        if count * STEP <= COARSE or count % 2 == 0:
            yield count * STEP


def with_mixes(task: Task, rows: RowScores, mixes: Sequence[Scheme], shrink: bool = False) -> Mixed:
    """Scores of the task's schemes, sums of their rows', and of the mixes.

    A layer's score in a format is distributed over its rows by their tempered scores. A mix's rows take the formats of
    least cost at its bytes, by one multiplier per layer, and the mix's score is the sum of their shares; layers' scores
    are `shrunk` before if requested. The score is NaN for a mix that is not possible in a layer of few or short rows.
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
    recorded = task.numbers(items, lambda layers: (numbers(layer) for layer in task.track(layers, "mixes")))
    count, scores = len(task.layers), np.array([row[: 2 * plain] for row in recorded]).reshape(-1, plain, 2)
    values, errors = (np.full((count, plain + len(mixes)), np.nan) for _ in range(2))
    whole = scores[..., 0], scores[..., 1]
    values[:, :plain], errors[:, :plain] = shrunk(task.layers, *whole) if shrink else whole
    assignments: dict[str, dict[str, str]] = {layer.name: {} for layer in task.layers}
    for i, (layer, row) in enumerate(zip(task.layers, recorded, strict=True)):
        shares = np.array(row[2 * plain : 2 * plain + len(mixes) * most]).reshape(len(mixes), most)
        places = _expanded(row[2 * plain + len(mixes) * most :], len(mixes), layer.rows)
        for j, (mix, part) in enumerate(zip(mixes, columns, strict=True)):
            if mix.mix is not None and mix.mix.suits(layer.rows, layer.cols):
                values[i, plain + j] = shares[j, : len(part)] @ values[i, part]
                errors[i, plain + j] = shares[j, : len(part)] @ errors[i, part]
                assignments[layer.name][mix.name] = digits(places[j])
    return Mixed((*task.schemes, *mixes), (values, errors), assignments)


def _condensed(places: NDArray[np.int64]) -> list[float]:
    """Digits (mixes, rows) as numbers that a float holds exactly."""
    parts = [places[start : start + HELD] for start in range(0, len(places), HELD)]
    return [float(number) for part in parts for number in (10 ** np.arange(len(part))) @ part]


def _expanded(numbers: Sequence[float], mixes: int, rows: int) -> Places:
    """The inverse of `_condensed`."""
    held = np.array(numbers, dtype=np.int64).reshape(-1, 1, rows)
    return (held // 10 ** np.arange(HELD)[:, None] % 10).reshape(-1, rows)[:mixes].astype(np.uint8)
