"""Scales of least squared error: clipping a few large weights gives a finer step to the others."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.core.grids import SCALES
from mpq.rounding import compiled
from mpq.rounding.codes import round_scales, snap
from mpq.rounding.reference import (
    Quantized,
    absmax_scales,
    check_weight,
    group_range,
    quantize,
    range_tables,
    real_scales,
    recode,
    round_minima,
    stacked,
    storable_scales,
    store_tables,
    tensor_scale_of,
    to_groups,
)
from mpq.rounding.super_blocks import settle

RATIOS = tuple(1.0 - 0.035 * step for step in range(20))  # factors of the absmax scale, 1 down to 0.335
RANGES = tuple(1.1 - 0.06 * step for step in range(10))  # factors of a group's range with a minimum, 1.1 to 0.56
ANCHORS = (0.0, 0.5, 1.0)  # fixed point of a range that widens or narrows: low end, middle, high end
REFITS = 3
BLOCK = 2**18  # elements searched at once, so that temporaries stay in the cache


def clip_search(
    weight: Tensor,  # (rows, cols)
    format: Format,
    second_moment: Tensor | None = None,
    *,
    importance: Tensor | None = None,  # (rows, cols) weights of the squared errors
) -> Quantized:
    """Nearest codes, with scales (and minima) of least (weighted) squared error for each group.

    Tries a ladder of clipping ratios, then alternates between least-squares scales and nearest codes, as LSQ-style
    initializations do; the error never rises. Asymmetric grids are tried with scales of both signs, where the scale's
    type has a sign. In super-blocks, scales and minima are real numbers first and then rounded to their integers. The
    second moment is not used.
    """
    if format.is_float_copy or weight.numel() == 0:
        return quantize(weight, format)
    check_weight(weight)
    weight = weight.detach()
    tensor_scale = tensor_scale_of(weight.float(), format)
    rows = len(weight) if format.granularity == "tensor" else max(1, BLOCK // weight.shape[1])
    parts = torch.split(weight, rows)
    shares = [None] * len(parts) if importance is None else torch.split(importance, rows)
    return stacked(
        [_search_rows(part.float(), format, tensor_scale, one) for part, one in zip(parts, shares, strict=True)]
    )


def _search_rows(weight: Tensor, format: Format, tensor_scale: Tensor | None, importance: Tensor | None) -> Quantized:
    elements = to_groups(weight, format)
    weights = to_groups(torch.ones_like(weight) if importance is None else importance.float(), format)
    search = _Search(elements, weights, format, tensor_scale)
    if format.minimum:
        _search_ranges(search, weight)
    else:
        widest, zeros = absmax_scales(weight, format, tensor_scale) if format.is_plain else range_tables(weight, format)
        search.offer_all([(widest, zeros), *_candidates(elements, widest, format)])
    for _ in range(REFITS):
        scales, minima = search.refit()
        search.offer(scales, search.zeros, minima)
    if format.super_group:
        return settle(weight, weights, search.scales, search.minima, quantize(weight, format))
    if format.minimum:
        return recode(weight, store_tables(search.scales, search.minima, format, weight))
    return quantize(weight, format, scales=search.scales, zeros=search.zeros, tensor_scale=tensor_scale)


class _Search:
    """The best scale, zero point and minimum of every group so far."""

    def __init__(self, elements: Tensor, weights: Tensor, format: Format, tensor_scale: Tensor | None) -> None:
        self.elements, self.weights, self.format, self.tensor_scale = elements, weights, format, tensor_scale
        self.scales = elements.new_ones(elements.shape[:-1])
        self.zeros: Tensor | None = None
        self.minima: Tensor | None = None
        self.errors = elements.new_full(elements.shape[:-1], torch.inf)
        self.is_compiled = elements.shape[-1] > 0 and compiled.serves(format.grid, elements, weights)

    def offer(self, scales: Tensor, zeros: Tensor | None = None, minima: Tensor | None = None) -> None:
        """Keep the offered scales where they have a smaller error."""
        scales, minima = self._storable(scales, minima)
        errors = self._errors(scales, zeros, minima)
        better = errors < self.errors
        self.errors = torch.where(better, errors, self.errors)
        self.scales = torch.where(better, scales, self.scales)
        if zeros is not None:
            self.zeros = zeros if self.zeros is None else torch.where(better, zeros, self.zeros)
        if minima is not None:
            self.minima = minima if self.minima is None else torch.where(better, minima, self.minima)

    def offer_all(self, candidates: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Offer several scales with their zero points; compiled code takes one pass over the elements."""
        grid = self.format.grid
        if not self.is_compiled:
            for scales, zeros in candidates:
                self.offer(scales, zeros)
            return
        stored = torch.stack([self._storable(scales, None)[0] for scales, _ in candidates])
        offsets = [zeros for _, zeros in candidates if zeros is not None]
        factors = [real_scales(scales, self.tensor_scale) for scales in stored]
        best, _ = compiled.best_scales(self.elements, self.weights, factors, offsets or None, grid)

        def chosen(tables: Tensor) -> Tensor:
            return tables.gather(0, best.unsqueeze(0)).squeeze(0)

        self.offer(chosen(stored), chosen(torch.stack(offsets)) if offsets else None)

    def refit(self, scales: Tensor | None = None, minima: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Offer least-squares scales (and minima) for the codes of these tables, or of the best so far."""
        scales, minima = (self.scales, self.minima) if scales is None else self._storable(scales, minima)
        factors = real_scales(scales, self.tensor_scale)
        if self.is_compiled and minima is None:
            fit = compiled.refit(self.elements, self.weights, factors, self.zeros, self.format.grid)
            return torch.where(fit != 0, fit if self.tensor_scale is None else fit / self.tensor_scale, scales), None
        units = self._units(factors.unsqueeze(-1), self.zeros, minima)
        if minima is not None:
            return self._refit_line(units, scales)
        power = (units.square() * self.weights).sum(-1)
        fit = (units * self.elements * self.weights).sum(-1) / power.clamp(min=torch.finfo(torch.float32).tiny)
        if self.tensor_scale is not None:
            fit = fit / self.tensor_scale
        return torch.where((power > 0) & (fit != 0), fit, scales), None

    def _errors(self, scales: Tensor, zeros: Tensor | None, minima: Tensor | None) -> Tensor:
        """Weighted squared error of every group."""
        factors = real_scales(scales, self.tensor_scale)
        if self.is_compiled and minima is None:
            offsets = None if zeros is None else [zeros]
            return compiled.best_scales(self.elements, self.weights, [factors], offsets, self.format.grid)[1]
        numbers = self._units(factors.unsqueeze(-1), zeros, minima).mul_(factors.unsqueeze(-1))
        if minima is not None:
            numbers.add_(minima.unsqueeze(-1))
        return numbers.sub_(self.elements).square_().mul_(self.weights).sum(-1)

    def _refit_line(self, units: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and intercept of the line through (code, weight); through zero where the intercept is positive."""
        total = self.weights.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        middle, height = ((x * self.weights).sum(-1) / total for x in (units, self.elements))
        centred = (units - middle.unsqueeze(-1)).mul_(self.weights)
        power, fit = (centred * units).sum(-1), (centred * self.elements).sum(-1)
        slope = torch.where((power > 0) & (fit != 0), fit / power.clamp(min=1e-30), scales)
        minima = height - slope * middle
        if self.format.super_group:
            weighted = units * self.weights
            through_zero = (weighted * self.elements).sum(-1) / (weighted * units).sum(-1).clamp(min=1e-30)
            slope = torch.where((minima > 0) & (through_zero != 0), through_zero, slope)
        return slope, minima

    def _storable(self, scales: Tensor, minima: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rounded to the format's types; in super-blocks, only clamped to values that can be stored."""
        if self.format.super_group:
            free = torch.where(scales == 0, torch.ones_like(scales), scales)
            return free, None if minima is None else minima.clamp(max=0)
        rounded = storable_scales(scales, self.format)
        return rounded, None if minima is None else round_minima(minima, self.format)

    def _units(self, factor: Tensor, zeros: Tensor | None, minima: Tensor | None) -> Tensor:
        elements = self.elements if minima is None else self.elements - minima.unsqueeze(-1)
        units = elements / factor
        if zeros is None:
            return snap(units, self.format.grid)
        offsets = zeros.unsqueeze(-1)
        return units.round_().add_(offsets).clamp_(0, self.format.grid.max).sub_(offsets)


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
    wider = format.grid.max / -format.grid.min if format.grid.signed else 1.0
    if wider != 1 and SCALES[format.scale].signed and format.scale not in ("e4m3",):
        candidates += [(widest * (sign * wider * ratio), None) for ratio in RATIOS for sign in (1, -1)]
    return candidates


def _search_ranges(search: _Search, weight: Tensor) -> None:
    """Offer each group's range, and lines fitted to the codes of wider and narrower ranges."""
    low, high = group_range(weight, search.format)
    search.offer((high - low) / search.format.grid.max, None, low)
    for anchor, ratio in product(ANCHORS, RANGES):
        width = (high - low) * ratio
        scales, minima = search.refit(width / search.format.grid.max, low + (high - low - width) * anchor)
        search.offer(scales, None, minima)
