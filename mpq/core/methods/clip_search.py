"""Scales by mean squared error: clipping a few large weights lets the many small ones be finer."""

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.core.rounding import (
    Quantized,
    absmax_scales,
    decode,
    encode,
    quantize,
    real_scales,
    round_scales,
    spread,
    tensor_scale_of,
)

RATIOS = tuple(1.0 - 0.035 * step for step in range(20))  # of the absmax scale, 1 down to 0.335
REFITS = 3


def clip_search(
    weight: Tensor,  # (rows, cols)
    format: Format,
    second_moment: Tensor | None = None,
    *,
    importance: Tensor | None = None,  # (rows, cols) weights of the squared errors
) -> Quantized:
    """Nearest codes, with the scale of each group that leaves the least (weighted) squared error.

    Tries a ladder of clipping ratios, then refits each scale to its codes by least squares, alternately (as in
    LSQ-style initialisations; the error never rises). Integer grids reach one step further below zero than above, so
    scales of both signs are tried where the scale's type has a sign. The second moment is not used.
    """
    start = quantize(weight, format)
    if format.is_float_copy or weight.numel() == 0:
        return start
    weight = weight.detach().float()
    tensor_scale = tensor_scale_of(weight, format)
    elements = spread(weight, format)
    weights = torch.ones_like(elements) if importance is None else spread(importance.float(), format)
    widest, zeros = absmax_scales(weight, format, tensor_scale)
    search = _Search(elements, weights, format, tensor_scale)
    search.offer(widest, zeros)
    for candidate, candidate_zeros in _candidates(elements, widest, format):
        search.offer(candidate, candidate_zeros)
    for _ in range(REFITS):
        search.offer(search.refit(), search.zeros)
    return quantize(weight, format, scales=search.scales, zeros=search.zeros)


class _Search:
    """The best scale of every group so far."""

    def __init__(self, elements: Tensor, weights: Tensor, format: Format, tensor_scale: Tensor | None) -> None:
        self.elements, self.weights, self.format, self.tensor_scale = elements, weights, format, tensor_scale
        self.scales = torch.ones(elements.shape[:-1])
        self.zeros: Tensor | None = None
        self.errors = torch.full(elements.shape[:-1], torch.inf)

    def offer(self, scales: Tensor, zeros: Tensor | None) -> None:
        """Keep the offered scales where they leave a smaller error."""
        scales = round_scales(scales, self.format.scale)
        factor = real_scales(scales, self.tensor_scale).unsqueeze(-1)
        residual = self._units(factor, zeros).mul_(factor).sub_(self.elements)
        errors = residual.square_().mul_(self.weights).sum(-1)
        better = errors < self.errors
        self.errors = torch.where(better, errors, self.errors)
        self.scales = torch.where(better, scales, self.scales)
        if zeros is not None:
            self.zeros = zeros if self.zeros is None else torch.where(better, zeros, self.zeros)

    def refit(self) -> Tensor:
        """The least-squares scales for the codes that the best scales give."""
        factor = real_scales(self.scales, self.tensor_scale).unsqueeze(-1)
        units = self._units(factor, self.zeros)
        power = (units.square() * self.weights).sum(-1)
        fit = (units * self.elements * self.weights).sum(-1) / power.clamp(min=torch.finfo(torch.float32).tiny)
        if self.tensor_scale is not None:
            fit = fit / self.tensor_scale
        return torch.where((power > 0) & (fit != 0), fit, self.scales)

    def _units(self, factor: Tensor, zeros: Tensor | None) -> Tensor:
        units = self.elements / factor
        grid = self.format.grid
        if zeros is None and grid.family == "int":
            return units.round_().clamp_(grid.min, grid.max)
        if zeros is None:
            return decode(encode(units, grid), grid)
        offsets = zeros.unsqueeze(-1)
        return units.round_().add_(offsets).clamp_(0, grid.max).sub_(offsets)


def _candidates(elements: Tensor, widest: Tensor, format: Format) -> list[tuple[Tensor, Tensor | None]]:
    if format.zero_point:
        low, high = elements.amin(-1).clamp(max=0), elements.amax(-1).clamp(min=0)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for ratio in RATIOS[1:]:
            scales = round_scales((high - low) * ratio / format.grid.max, format.scale)
            pairs.append((scales, (-low * ratio / scales).round().clamp(0, format.grid.max)))
        return pairs
    if format.scale == "e8m0":
        return [(widest * 0.5, None), (widest * 2, None)]
    candidates: list[tuple[Tensor, Tensor | None]] = [(widest * ratio, None) for ratio in RATIOS[1:]]
    if format.grid.family == "int" and format.grid.signed and format.scale in ("fp32", "fp16", "bf16"):
        wider = format.grid.max / -format.grid.min
        candidates += [(widest * (sign * wider * ratio), None) for ratio in RATIOS for sign in (1, -1)]
    return candidates
