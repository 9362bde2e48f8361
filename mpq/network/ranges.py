"""Ranges of the layers' inputs over calibration data: what runtimes with static activation scales want to know."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, evaluating
from mpq.network.moments import watching

Ranges = Mapping[str, tuple[float, float]]  # smallest and largest input, by layer name


def input_ranges(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn) -> Ranges:
    """Smallest and largest input of every layer that a batch reaches, by layer name; embeddings have none.

    `forward(model, batch)` runs the model; its result is not used.
    """
    found: dict[str, tuple[float, float]] = {}

    def see(name: str, module: nn.Module, inputs: Tensor) -> None:
        low, high = found.get(name, (torch.inf, -torch.inf))
        found[name] = min(low, inputs.min().item()), max(high, inputs.max().item())

    with torch.no_grad(), evaluating(model), watching(model, layers, see):
        for batch in batches:
            forward(model, batch)
    return found


def static_scale(format: Format, span: tuple[float, float]) -> float:
    """The one scale of an activation format, without a zero point, that holds a range; 1 when there is only zero."""
    return max(map(abs, span)) / format.grid.max or 1.0
