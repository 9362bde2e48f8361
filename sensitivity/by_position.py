"""Curvature of the divergence where every position has its own label, as in language models."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.pieces import rows_at_once
from mpq.network.calibration import samples_in
from mpq.network.moments import half_gram, whole_gram
from mpq.network.parallel import gathered, rank_and_count, total
from mpq.sensitivity.activation_errors import input_error_slopes
from mpq.sensitivity.backward import Labels, Piece, pieces, stream_uses
from mpq.sensitivity.derivatives import Use, keeps_samples
from mpq.sensitivity.output import Sums, add
from mpq.sensitivity.rows import FLOOR, TEMPER, TOKENS_FLOOR, tempered
from mpq.sensitivity.standard_error import power_sums, relative_error
from mpq.sensitivity.task import RowScores, Task

OUTLIER = 1 / 32  # share of a piece's sum of |g_t|^2 |x_t|^2 above which a position is an outlier


@dataclass
class PositionCurvature:
    """A layer's curvature, summed over positions: row r's is H s_r, a matrix (cols, cols) times a number.

    Of position t, x_t is the layer's input and g_t the gradient of its output. H is the sum of |g_t|^2 x_t x_t^T, s_r
    row r's share of the squared gradients. An embedding's rows are tokens: H is the sum of g_t g_t^T, s_r the token's
    share of |g_t|^2. Positions that dominate the sum, such as the first one with massive activations, have their
    gradients in other rows than the rest, so they are kept separately, row by row.
    """

    layer: Layer
    formats: tuple[Format, ...] = ()  # activation formats
    # "moment": (groups, half of cols x cols); "rows": (groups, rows / groups), sums of g_tr^2. An embedding's
    # "lookups": (1, half of cols x cols); "tokens": (1, rows), sums of |g_t|^2. An activation format: (), sum of the
    # squares of `input_error_slopes`. "power sums": of the samples' sums of |g_t|^2 |x_t|^2.
    sums: Sums = field(default_factory=dict)
    outliers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # x_t (found, cols) and g_tr^2 (found, rows)

    def add(self, uses: list[Use], samples: int) -> None:
        """Take the calls of the layer on some samples."""
        sizes = torch.zeros(samples, dtype=torch.float32)
        for use in uses:
            if isinstance(use.module, nn.Embedding):
                slopes = use.gradient.float().flatten(0, -2)
                squares = slopes.square().sum(-1)
                tokens = torch.zeros(1, self.layer.rows, device=squares.device, dtype=torch.float32)
                add(self.sums, "lookups", half_gram(slopes.unsqueeze(0)).cpu())
                add(self.sums, "tokens", tokens.index_add_(1, use.inputs.flatten(), squares.unsqueeze(0)).cpu())
            else:
                inputs, slopes = use.flat()
                squares = (inputs.square().sum(-1) * slopes.square().sum(-1)).sum(0)
                if len(inputs) == 1:
                    slopes = self._keep_outliers(inputs[0], slopes[0], squares).unsqueeze(0)
                weighted = inputs * torch.linalg.vector_norm(slopes, dim=-1, keepdim=True)
                add(self.sums, "rows", slopes.square().sum(1).cpu())
                add(self.sums, "moment", half_gram(weighted).cpu())
                for format in self.formats:
                    add(self.sums, format, input_error_slopes(use, format).square().sum(dtype=torch.float64).cpu())
            apart = keeps_samples(use, samples)
            sizes += squares.reshape(samples, -1).sum(1).cpu() if apart else squares.sum().cpu() / samples
        add(self.sums, "power sums", power_sums(sizes))

    def _keep_outliers(self, inputs: Tensor, slopes: Tensor, squares: Tensor) -> Tensor:
        """Store outlier positions separately; returns the slopes with zeros at these positions."""
        outliers = squares > OUTLIER * squares.sum()
        self.outliers.append((inputs[outliers].cpu(), slopes[outliers].square().cpu()))
        return slopes.masked_fill(outliers.unsqueeze(-1), 0.0)

    def rows(self, difference: Tensor, exponents: Sequence[float] = (1.0,)) -> Tensor:
        """dw_r H dw_r^T s_r of every row of a weight error (rows, cols), summed over the samples, float64.

        Once for each exponent that the shares s_r are tempered by (`mpq.sensitivity.rows.tempered`): (exponents, rows).
        """
        sums = torch.zeros(len(exponents), self.layer.rows, dtype=torch.float64)
        for moment, shares, floor in (("moment", "rows", FLOOR), ("lookups", "tokens", TOKENS_FLOOR)):
            if moment in self.sums:
                squares = self.sums[shares].double()
                share = squares / squares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
                blocks = difference.reshape(len(squares), -1, self.layer.cols)
                whole = whole_gram(self.sums[moment], self.layer.cols)
                parts = torch.split(blocks, rows_at_once(self.layer.cols), 1)
                errors = torch.cat([((part @ whole) * part).sum(-1) for part in parts], 1)
                for costs, exponent in zip(sums, exponents, strict=True):
                    costs += (errors.double() * tempered(share, exponent, floor)).flatten()
        for inputs, squares in self.outliers:
            errors = (difference @ inputs.mT).square()
            for costs, exponent in zip(sums, exponents, strict=True):
                costs += (errors * tempered(squares, exponent).mT).sum(1, dtype=torch.float64)
        return sums.clamp(min=0)

    def inputs(self, format: Format | None) -> float:
        """Cost of rounding the inputs to an activation format, summed over the samples."""
        return self.sums[format].item() if format in self.sums else 0.0

    def relative_error(self) -> float:
        """The standard error of the sum over all rows; 0 without gradients."""
        return relative_error(self.sums["power sums"]) if "power sums" in self.sums else 0.0


def position_scores(task: Task, labels: Labels) -> RowScores:
    """Every layer's scores, from a pass over the data; each layer is rounded when it is asked for."""
    formats = tuple(dict.fromkeys(scheme.activation for scheme in task.schemes if scheme.activation is not None))
    statistics = {layer.name: PositionCurvature(layer, formats) for layer in task.layers}

    def see(name: str, piece: Piece, uses: list[Use]) -> None:
        statistics[name].add(uses, piece.samples)

    for piece in pieces(task, "output gradients"):
        stream_uses(task, piece, see, labels)
    rank, processes = rank_and_count()
    for name, each in statistics.items():
        each.sums = total(each.sums)
        everywhere = gathered({(name, rank): each.outliers})
        each.outliers = [part for other in range(processes) for part in everywhere[name, other]]
    count = labels.draws * sum(samples_in(batch) for batch in task.batches)

    def rows(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        curvature, columns = statistics[layer.name], dict[Format, Tensor]()
        for scheme in task.schemes:
            if scheme.weight not in columns:
                columns[scheme.weight] = curvature.rows(task.weight_error(layer, scheme).cpu(), (1.0, TEMPER))
        costs = [columns[scheme.weight] + curvature.inputs(scheme.activation) / layer.rows for scheme in task.schemes]
        scores, tempered_scores = 0.5 / count * torch.stack(costs, 2)
        return scores, tempered_scores, scores.sum(0) * curvature.relative_error()

    return rows
