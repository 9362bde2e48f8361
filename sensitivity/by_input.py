"""Curvature of the divergence where one label stands for a whole input, as for images and sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.network.calibration import samples_in
from mpq.network.parallel import total
from mpq.sensitivity.activation_errors import input_error_slopes
from mpq.sensitivity.backward import Labels, Piece, pieces, stream_uses
from mpq.sensitivity.derivatives import Use
from mpq.sensitivity.rows import TEMPER, tempered
from mpq.sensitivity.task import RowScores, Task

CHUNK = 2**24  # numbers of per-input gradients held at a time
HELD = 2**27  # numbers of weight errors held at a time; the data passes once for each such portion of the layers


@dataclass
class InputCurvature:
    """A layer's weight errors along the gradients of single inputs, summed over inputs and draws."""

    layer: Layer
    errors: Tensor  # (rows, cols, weight formats), Q(W) - W
    formats: tuple[Format, ...] = ()  # activation formats
    squares: Tensor = field(init=False)  # (rows, weight formats) float64, sum of (dw_r . G_r)^2
    # By piece (batch, first sample): (samples, weight formats + activation formats), float64, sums over rows and draws.
    by_sample: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.layer.rows, self.errors.shape[-1], dtype=torch.float64)

    def add(self, uses: list[Use], piece: Piece) -> None:
        """Add the calls of the layer on some samples. Calls on the same sample are summed before squaring."""
        if all(isinstance(use.module, nn.Embedding) for use in uses):
            curvatures = torch.stack([self._of_tokens(uses, sample, piece.samples) for sample in range(piece.samples)])
        else:
            curvatures = torch.cat(list(self._of_gradients(uses, piece.samples)))
        costs = [curvatures, *(self._of_inputs(uses, format, piece.samples) for format in self.formats)]
        key, numbers = (piece.index, piece.start), torch.cat(costs, 1).double().cpu()
        self.by_sample[key] = self.by_sample[key] + numbers if key in self.by_sample else numbers

    def _of_gradients(self, uses: list[Use], samples: int) -> Iterator[Tensor]:
        step = max(1, CHUNK // self.layer.params)
        errors = self.errors.to(uses[0].gradient.device)
        for start in range(0, samples, step):
            count = min(step, samples - start)
            parts = uses if samples == 1 else [use.take(slice(start, start + count)) for use in uses]
            gradients = sum(part.weight_gradients(count, self.layer.rows) for part in parts)
            assert isinstance(gradients, Tensor)
            products = torch.bmm(gradients.transpose(0, 1), errors).square()  # (rows, samples, formats)
            self.squares += products.sum(1, dtype=torch.float64).cpu()
            yield products.sum(0)

    def _of_tokens(self, uses: list[Use], sample: int, samples: int) -> Tensor:
        tokens = torch.cat([use.inputs.reshape(samples, -1)[sample] for use in uses])
        slopes = torch.cat([use.gradient.float().reshape(samples, -1, self.layer.cols)[sample] for use in uses])
        seen, place = torch.unique(tokens, return_inverse=True)
        gradients = slopes.new_zeros(len(seen), self.layer.cols).index_add_(0, place, slopes)
        products = torch.bmm(gradients.unsqueeze(1), self.errors[seen.cpu()].to(slopes.device)).squeeze(1).square()
        self.squares.index_add_(0, seen.cpu(), products.double().cpu())
        return products.sum(0)

    def _of_inputs(self, uses: list[Use], format: Format, samples: int) -> Tensor:
        calls = [use for use in uses if not isinstance(use.module, nn.Embedding)]
        products = [input_error_slopes(use, format).reshape(samples, -1).sum(1) for use in calls]
        if not products:
            return torch.zeros(samples, 1, dtype=torch.float32)
        return torch.stack(products).sum(0).square().unsqueeze(1)


def input_scores(task: Task, labels: Labels) -> RowScores:
    """Every layer's scores, from a pass over the data for each portion of the layers."""
    weights = tuple(dict.fromkeys(scheme.weight for scheme in task.schemes))
    activations = tuple(dict.fromkeys(each.activation for each in task.schemes if each.activation is not None))
    scores: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for layers in _portions(task.layers, len(weights)):
        part = replace(task, layers=tuple(layers))
        statistics = {
            layer.name: InputCurvature(layer, _weight_errors(task, layer, weights), activations)
            for layer in task.track(layers, "rounding")
        }

        def see(name: str, piece: Piece, uses: list[Use], statistics: dict[str, InputCurvature] = statistics) -> None:
            statistics[name].add(uses, piece)

        for piece in pieces(part, "per-input gradients"):
            stream_uses(part, piece, see, labels, apart=True)
        for name, each in statistics.items():
            scores[name] = _mean_scores(task, each, weights, activations, labels.draws)
    return lambda layer: scores[layer.name]


def _portions(layers: Sequence[Layer], formats: int) -> Iterator[list[Layer]]:
    portion: list[Layer] = []
    for layer in layers:
        if portion and (sum(each.params for each in portion) + layer.params) * formats > HELD:
            yield portion
            portion = []
        portion.append(layer)
    yield portion


def _weight_errors(task: Task, layer: Layer, weights: Sequence[Format]) -> Tensor:
    schemes = {scheme.weight: scheme for scheme in task.schemes}
    errors = torch.empty(layer.rows, layer.cols, len(weights), dtype=torch.float32)
    for number, format in enumerate(weights):
        errors[..., number] = task.weight_error(layer, schemes[format])
    return errors


def _mean_scores(
    task: Task, curvature: InputCurvature, weights: Sequence[Format], activations: Sequence[Format], draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    columns = [weights.index(scheme.weight) for scheme in task.schemes]
    rows = curvature.squares[:, columns]
    parts = list(curvature.by_sample.values())
    scores = torch.cat(parts) if parts else torch.zeros(0, len(weights) + len(activations), dtype=torch.float64)
    numbers = scores[:, columns]
    for place, scheme in enumerate(task.schemes):
        if scheme.activation is not None:
            costs = scores[:, len(weights) + activations.index(scheme.activation)]
            numbers[:, place] += costs
            rows[:, place] += costs.sum() / len(rows)
    sums = total({"rows": rows, "sum": numbers.sum(0), "squares": numbers.square().sum(0)})
    count = sum(samples_in(batch) for batch in task.batches)
    means = sums["sum"] / draws / count
    variances = (sums["squares"] / draws**2 / count - means.square()).clamp(min=0) / max(count - 1, 1)
    scores = 0.5 * sums["rows"] / draws / count
    return scores, _compared(scores, curvature.errors[..., columns]), 0.5 * (variances.sqrt() if count > 1 else means)


def _compared(scores: Tensor, errors: Tensor) -> Tensor:
    """Scores (rows, schemes) for comparing rows of one layer, of weight errors (rows, cols, schemes).

    A row's score in one format from few inputs is noisy. To reduce the noise in comparisons of formats, it is replaced
    by the geometric mean of the score itself and of the one by the row's mean curvature over all formats. Curvatures
    are tempered.
    """
    tiny = torch.finfo(torch.float64).tiny
    sizes = errors.square().sum(1, dtype=torch.float64).clamp(min=tiny)
    curvatures = (scores / sizes).mean(1)
    factors = tempered(curvatures, TEMPER) / curvatures.clamp(min=tiny)
    return (scores * sizes * curvatures.unsqueeze(1)).sqrt() * factors.unsqueeze(1)
