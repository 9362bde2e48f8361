"""Ranges of the layers' inputs over calibration data, for static activation scales."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, counted_positions, evaluating
from mpq.network.experts import routing
from mpq.network.moments import counted_rows, watching

Ranges = Mapping[str, tuple[float, float]]  # smallest and largest input, by layer name


def input_ranges(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn) -> Ranges:
    """Smallest and largest input of every layer with inputs, by layer name; embeddings are left out.

    Hidden positions (`counted_positions`) do not count. `forward(model, batch)` runs the model; its result is ignored.
    """
    ranges: dict[str, tuple[float, float]] = {}
    masks: tuple[Tensor, ...] = ()

    def see(name: str, module: nn.Module, inputs: Tensor) -> None:
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
            inputs = counted_rows(inputs.reshape(-1, inputs.shape[-1]), inputs, masks, routed.get(module))
        if inputs.numel() == 0:
            return
        low, high = ranges.get(name, (torch.inf, -torch.inf))
        ranges[name] = min(low, inputs.min().item()), max(high, inputs.max().item())

    with torch.no_grad(), evaluating(model), routing(model) as routed, watching(model, layers, see):
        for batch in batches:
            masks = counted_positions(batch)
            forward(model, batch)
    return ranges


def static_scale(format: Format, span: tuple[float, float]) -> float:
    """The scale of a symmetric activation format that covers a range; 1 for a range of zeros only."""
    return max(map(abs, span)) / format.grid.max or 1.0
