"""Computing programs: each primitive once for all layers and schemes, on the statistics' flat arrays."""

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.proxies.programs import ELEMENTWISE, INPUTS, LAYER, OWN, REDUCTIONS, Apply, Input, Number, Program, kind_of
from mpq.proxies.programs import formula as spell
from mpq.proxies.statistics import Space, Statistics

Array: TypeAlias = NDArray[Any]
MEMORY = 400_000_000  # bytes of values that are kept
ROUNDING = 1e-6  # relative rounding error of float32


@dataclass(frozen=True, eq=False)
class Value:
    """Numbers of a space, (1 or schemes, elements or layers)."""

    space: str
    numbers: Array


class Evaluator:
    """Values of programs on one model's statistics; values of repeated subprograms are cached."""

    def __init__(self, statistics: Statistics, memory: int = MEMORY) -> None:
        self.statistics, self.memory, self.used = statistics, memory, 0
        self.known: OrderedDict[Program, Value] = OrderedDict()

    def table(self, program: Program) -> NDArray[np.float64]:
        """The program's number for each layer and scheme, (layers, schemes); a matrix per layer counts by its mean.

        Numbers may be NaN or infinite: `finite_table` refuses them.

        Raises:
            MpqError: a part whose kinds do not fit, or statistics that were not collected.
        """
        kind_of(program)
        with np.errstate(all="ignore"):
            value = self.value(program)
            if value.space != LAYER:
                value = Value(LAYER, _signed_mean(value.numbers, self.statistics.space(value.space)))
        shape = (len(self.statistics.schemes), len(self.statistics.layers))
        return np.broadcast_to(value.numbers, shape).T.astype(np.float64)

    def finite_table(self, program: Program) -> NDArray[np.float64]:
        """As `table`.

        Raises:
            MpqError: a number that is NaN or infinite; the first layer and scheme are named.
        """
        table = self.table(program)
        for row, column in np.argwhere(~np.isfinite(table)):
            layer, scheme = self.statistics.layers[row].name, self.statistics.schemes[column]
            raise MpqError(
                f"the proxy {spell(program)} is {table[row, column]} for layer {layer} in {scheme}: "
                "it does not suit this model"
            )
        return table

    def value(self, program: Program) -> Value:
        """The value of a program whose kinds were checked."""
        if isinstance(program, Number):
            return Value(LAYER, np.full((1, len(self.statistics.layers)), program.value))
        if isinstance(program, Input):
            return Value(INPUTS[program.name][0].space, self.statistics.get(program.name))
        known = self.known.get(program)
        if known is not None:
            self.known.move_to_end(program)
            return known
        value = self._apply(program)
        if value.numbers.nbytes * 20 < self.memory:
            self.known[program] = value
            self.used += value.numbers.nbytes
            while self.used > self.memory:
                self.used -= self.known.popitem(last=False)[1].numbers.nbytes
        return value

    def _apply(self, program: Apply) -> Value:
        name, values = program.operation, [self.value(argument) for argument in program.arguments]
        first = values[0]
        if name in ELEMENTWISE:
            return Value(first.space, FUNCTIONS[name](first.numbers))
        if name in OWN or name in REDUCTIONS:
            numbers = WITHIN[name](first.numbers, self.statistics.space(first.space))
            return Value(LAYER if name in REDUCTIONS else first.space, numbers)
        if name == "matmul":
            space = self.statistics.space(first.space)
            return Value(first.space + "'", _matmul(first.numbers, values[1].numbers, space))
        space_name = first.space if first.space != LAYER else values[1].space
        left, second = (self._spread(value, space_name) for value in values)
        return Value(space_name, COMBINATIONS[name](left, second))

    def _spread(self, value: Value, space: str) -> Array:
        if value.space == space:
            return value.numbers
        owners = self.statistics.space(space).owners
        return value.numbers.astype(np.float32)[:, owners]


def _sums(numbers: Array, space: Space) -> Array:
    return np.add.reduceat(numbers, space.starts, axis=-1, dtype=np.float64)


def _mean(numbers: Array, space: Space) -> Array:
    return np.asarray(_sums(numbers, space) / space.counts)


def _signed_mean(numbers: Array, space: Space) -> Array:
    """The mean, or 0 if it is below the rounding error of float32 terms that cancel."""
    mean = _mean(numbers, space)
    return np.where(np.abs(mean) < ROUNDING * _mean(np.abs(numbers), space), 0.0, mean)


def _std(numbers: Array, space: Space) -> Array:
    return np.asarray(np.sqrt(_mean(_centred(numbers, space) ** 2, space)))


def _centred(numbers: Array, space: Space) -> Array:
    return np.asarray(numbers - _mean(numbers, space).astype(numbers.dtype)[:, space.owners])


def _normalize(numbers: Array, space: Space) -> Array:
    return np.asarray(_centred(numbers, space) / _std(numbers, space).astype(numbers.dtype)[:, space.owners])


def _minmax(numbers: Array, space: Space) -> Array:
    low = np.minimum.reduceat(numbers, space.starts, axis=-1)
    span = np.maximum.reduceat(numbers, space.starts, axis=-1) - low
    return np.asarray((numbers - low[:, space.owners]) / span[:, space.owners])


def _logsoftmax(numbers: Array, space: Space) -> Array:
    shifted = numbers - np.maximum.reduceat(numbers, space.starts, axis=-1)[:, space.owners]
    logs = np.log(_mean(np.exp(shifted), space) * space.totals)  # log of the sum over the whole matrix
    return np.asarray(shifted - logs.astype(numbers.dtype)[:, space.owners])


def _matmul(left: Array, right: Array, space: Space) -> Array:
    """X Y^T of each layer, scaled up to all columns."""
    schemes = max(len(left), len(right))
    parts = []
    for start, rows, cols, all_cols in zip(space.starts, space.rows, space.cols, space.all_cols, strict=True):
        x, y = (each[:, start : start + rows * cols].reshape(len(each), rows, cols) for each in (left, right))
        parts.append((x @ y.transpose(0, 2, 1) * np.float32(all_cols / cols)).reshape(schemes, -1))
    return np.concatenate(parts, axis=1)


def _abslog(numbers: Array) -> Array:
    return np.asarray(np.log(np.where(numbers == 0, numbers.dtype.type(1), np.abs(numbers))))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "log": np.log, "abslog": _abslog, "abs": np.abs, "square": np.square, "exp": np.exp,
    "relu": lambda x: np.asarray(np.maximum(x, 0)), "invert": np.reciprocal, "sqrt": np.sqrt, "neg": np.negative,
    "sigmoid": lambda x: np.asarray(1 / (1 + np.exp(-x))), "sign": np.sign,
}  # fmt: skip
WITHIN: dict[str, Callable[[Array, Space], Array]] = {
    "softmax": lambda x, space: np.asarray(np.exp(_logsoftmax(x, space))), "logsoftmax": _logsoftmax,
    "normalize": _normalize, "minmax": _minmax, "mean": _signed_mean, "std": _std,
    "sum": lambda x, space: np.asarray(_signed_mean(x, space) * space.totals),
    "l1": lambda x, space: np.asarray(_mean(np.abs(x), space) * space.totals),
    "norm": lambda x, space: np.asarray(np.sqrt(_mean(np.square(x), space) * space.totals)),
}  # fmt: skip
COMBINATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
}  # fmt: skip
