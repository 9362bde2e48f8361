"""Scores of cached keys and values: the predicted divergence from rounding them to each format."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.core.cache import TokenBlocks, cache_name
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.kernels.kv_cache import round_vectors
from mpq.kernels.token_blocks import whole
from mpq.network.cached import changing
from mpq.network.calibration import check_gradient, check_loss, logits_of, samples_in
from mpq.network.parallel import total
from mpq.sensitivity.backward import Piece, pieces
from mpq.sensitivity.derivatives import Draw, loss_predictions, slopes_of
from mpq.sensitivity.graph import only_gradients_of
from mpq.sensitivity.predictions import predictions
from mpq.sensitivity.standard_error import power_sums, relative_error
from mpq.sensitivity.task import Scores, Task


def cache_scores(task: Task, entries: Sequence[Layer], formats: Sequence[Format]) -> Scores:
    """Predicted KL divergence from the float model, of every entry and format, (entries, formats).

    Half the mean of (dv . g)^2 over vectors v of a token and head, dv what rounding changes, and g the gradient with
    labels drawn from the model's own predictions (the data's labels where the loss is not cross-entropy). Vectors count
    as independent. On the bundled language model and a Llama of 5 million parameters that ranks single entries as
    measuring them does (Spearman 0.99), and sums are 5 to 25 % too low, most at 2 bits
    (experiments/benchmarks/bench_kv.py). One forward and one backward pass serve all formats. The standard error is
    over samples. Blocks of tokens are scored on texts that fill some, and not for layers with a window.
    """
    names = [cache_name(format) for format in formats]
    rows = task.numbers(
        {f"cache in {' '.join(names)}": None}, lambda items: (_scored(task, entries, formats) for _ in items)
    )
    table = np.array(rows[0], dtype=np.float64).reshape(len(entries), len(formats), 2)
    scores, errors = table[..., 0].copy(), table[..., 1].copy()
    for row, entry in enumerate(entries):  # a window drops single tokens, not whole blocks
        scores[row, [entry.window > 0 and isinstance(format, TokenBlocks) for format in formats]] = np.nan
    return scores, errors


def _scored(task: Task, entries: Sequence[Layer], formats: Sequence[Format]) -> list[float]:
    sums = {
        (entry.name, place): torch.zeros(3, dtype=torch.float64) for entry in entries for place in range(len(formats))
    }
    drawn = loss_predictions(task, next(Piece(task.batches[0], 0, 0).split(1)).batch) is not None
    for piece in pieces(task, "cache gradients"):
        seen = _Seen([entry.name for entry in entries], formats, piece.samples)
        with only_gradients_of(task.model), changing(task.model, seen.watch):
            _backward(task, piece, drawn)
        for key in sums:
            sums[key] += power_sums(seen.squares[key[0]][key[1]])
    count = sum(samples_in(batch) for batch in task.batches)
    numbers: list[float] = []
    for power in total(sums).values():
        score = 0.5 * float(power[1]) / count
        numbers += [score, score * relative_error(power)]
    return numbers


class _Seen:
    """Sums of (dv . g)^2 of each entry, (formats, samples), from one backward pass."""

    def __init__(self, names: Sequence[str], formats: Sequence[Format], samples: int) -> None:
        self.formats = formats
        self.squares = {name: torch.zeros(len(formats), samples, dtype=torch.float32) for name in names}

    def watch(self, name: str, vectors: Tensor) -> Tensor:
        """The vectors, with a hook on their gradient."""
        if name not in self.squares:
            return vectors
        watched = vectors if vectors.requires_grad else vectors.detach().requires_grad_()
        watched.register_hook(partial(self._add, name, watched.detach()))  # type: ignore[no-untyped-call]
        return watched

    @torch.no_grad()
    def _add(self, name: str, vectors: Tensor, gradient: Tensor) -> None:
        for place, format in enumerate(self.formats):
            share = _rounded_share(vectors, format)
            change = round_vectors(vectors, format).float() - vectors.float()
            squares = (change * gradient.float()).sum(-1).square()
            self.squares[name][place] += squares.reshape(len(squares), -1).sum(1).cpu() / share


def _rounded_share(vectors: Tensor, format: Format) -> float:
    """Share of the tokens that a format rounds; NaN for texts shorter than its blocks, which say nothing of it."""
    if not isinstance(format, TokenBlocks):
        return 1.0
    return whole(vectors.shape[2], format) / vectors.shape[2] or math.nan


def _backward(task: Task, piece: Piece, drawn: bool) -> None:
    """One backward pass of a piece, scaled so that gradients belong to each sample's own loss."""
    outputs: list[Any] = []
    handle = task.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        loss = check_loss(task.loss_fn(task.model, piece.batch), piece.index)
    finally:
        handle.remove()
    if not drawn:
        torch.autograd.backward([check_gradient(loss)], [torch.full_like(loss, piece.samples)])
        return
    top = [logits_of(output) for output in outputs]
    weights = [each.weights for each in predictions(task.model, piece.batch, task.loss_fn, outputs)]
    draw = Draw(("cache", piece.index, piece.start))
    with torch.no_grad():
        slopes = slopes_of(task, draw, [each.detach() for each in top], [weight * piece.samples for weight in weights])
    torch.autograd.backward(top, slopes)
