"""The input of a metric, and the loop over layers and schemes that most metrics share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import Batch, LossFn, take
from mpq.network.layers import weight_matrix
from mpq.network.parallel import rank_and_count, share
from mpq.network.storage import release_memory
from mpq.rounding.reference import dequantize
from mpq.rounding.store import Rounder
from mpq.sensitivity import METRICS
from mpq.sensitivity.journal import Journal

Item = TypeVar("Item")
Scores: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]  # scores and standard errors, (layers, schemes)


@dataclass(frozen=True)
class Task:
    """A model in evaluation mode, its data, and the layers and schemes to score."""

    model: nn.Module
    batches: tuple[Batch, ...]
    loss_fn: LossFn
    layers: tuple[Layer, ...]
    schemes: tuple[Scheme, ...]
    rounder: Rounder
    seed: int = 0
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    progress: bool = False
    flat: bool = False  # the loss has no gradient at this model with the data's labels
    second: bool = False  # the layers' inputs have the samples along their second dimension
    together: bool = False  # batches cannot be cut: single samples have no loss

    def module(self, layer: Layer) -> nn.Module:
        """The module that holds the layer's weight."""
        return self.model.get_submodule(layer.name)

    def quantized(self, layer: Layer, scheme: Scheme) -> Tensor:
        """The layer's weight rounded to this scheme, float32 (rows, cols)."""
        return dequantize(self.rounder.quantized(layer, weight_matrix(self.module(layer)), scheme))

    def weight_error(self, layer: Layer, scheme: Scheme) -> Tensor:
        """Q(W) - W, float32 (rows, cols)."""
        return self.quantized(layer, scheme) - weight_matrix(self.module(layer)).detach().float()

    def few_samples(self, count: int, index: int = 0) -> Batch:
        """The first samples of a batch, or the whole batch where it cannot be cut."""
        return self.batches[index] if self.together else take(self.batches[index], slice(0, count))

    def own_batches(self, what: str) -> Iterator[int]:
        """Indices of the batches that this process passes through the model, with a progress bar."""
        yield from self.track(share(range(len(self.batches))), what)

    def numbers(
        self,
        items: Mapping[str, Item],
        work: Callable[[Sequence[Item]], Iterable[Sequence[float]]],
        adjacent: bool = False,
    ) -> list[list[float]]:
        """The numbers of every item, in order: from the journal, or what `work(items)` yields for those it lacks.

        Each process works on a share of them, contiguous if `adjacent`; all processes get all results.
        """
        missing = share([name for name in items if self.journal.recall(name) is None], adjacent)
        for name, numbers in zip(missing, work([items[name] for name in missing]), strict=True):
            self.journal.note(name, numbers)
            release_memory()  # one layer's freed tensors fragment memory for the next one's
        return self.journal.agree(items)

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a progress bar if requested."""
        yield from tqdm(
            items,
            desc=what,
            total=total,
            disable=None if self.progress and rank_and_count()[0] == 0 else True,
            leave=False,
            dynamic_ncols=True,
        )


Metric: TypeAlias = Callable[..., Scores]  # metric(task, **options)

# Of a layer: scores by row of its weight matrix, the same tempered, both (rows, schemes), and standard errors of the
# scores' sums, (schemes,).
RowScores: TypeAlias = Callable[[Layer], tuple[Tensor, Tensor, Tensor]]


def score_errors(task: Task, score: Callable[[Layer, Scheme, Tensor], tuple[float, float]]) -> Scores:
    """Scores and standard errors from `score(layer, scheme, Q(W) - W)`: one weight error is held at a time."""

    def row(layer: Layer) -> list[float]:
        return [number for scheme in task.schemes for number in score(layer, scheme, task.weight_error(layer, scheme))]

    return by_layer(task, row, "rounding")


def score_weight_errors(
    task: Task,
    score: Callable[[Layer, Tensor], tuple[float, float]],
    activation: Callable[[Layer, Format], tuple[float, float]] | None = None,
) -> Scores:
    """Scores and standard errors from `score(layer, Q(W) - W)`.

    The cost of a scheme's activation format, `activation(layer, format)`, is added if that function is given.

    Raises:
        MpqError: a scheme that quantizes activations, when there is none.
    """
    for scheme in task.schemes:
        if scheme.activation is not None and activation is None:
            raise MpqError(
                f"this metric scores weight formats only, not {scheme.name}: take one of "
                f"{', '.join(METRICS.names(activations=True))} for it"
            )

    def both(layer: Layer, scheme: Scheme, difference: Tensor) -> tuple[float, float]:
        value, error = score(layer, difference)
        if scheme.activation is None or activation is None:
            return value, error
        more, its_error = activation(layer, scheme.activation)
        return value + more, math.hypot(error, its_error)

    return score_errors(task, both)


def by_layer(task: Task, row: Callable[[Layer], Sequence[float]], what: str) -> Scores:
    """Table of `row(layer)` = score, error, score, error, ...; rows are written to the journal when computed."""
    items = {layer.name: layer for layer in task.layers}
    rows = task.numbers(items, lambda layers: (row(layer) for layer in task.track(layers, what)))
    table = np.array(rows, dtype=np.float64).reshape(len(task.layers), len(task.schemes), 2)
    return table[..., 0].copy(), table[..., 1].copy()
