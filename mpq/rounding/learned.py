"""Learned step sizes (LSQ, arXiv 1902.08153): a matrix on a grid whose scales are fixed or parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.rounding.activations import straight_through
from mpq.rounding.codes import snap
from mpq.rounding.reference import (
    Quantized,
    dequantize,
    from_groups,
    group_minima,
    group_scales,
    no_codes,
    recode,
    storable_scales,
    to_groups,
)


def learnable(format: Format) -> bool:
    """Whether a format has scales that can be parameters: all but float copies and scales in units of super-blocks."""
    return not (format.is_float_copy or format.super_group)


class GridRounding(nn.Module):
    """Rounds a matrix to the nearest codes under the tables of its first rounding.

    Zero points and minima stay. Scales stay or are learned: then each is its first value times exp(shift), rounded to
    the type that stores it. The parameter is relative, so that one rate of Adam serves scales of every size; with SGD
    it moves a scale as LSQ's step size does, whose gradient scale it contains. Gradients pass fixed scales as if
    rounding were the identity (straight-through); under learned scales, elements beyond the grid's ends have none.

    Args:
        first: codes and tables, of one format or of a mix.
        learned: whether scales are parameters, in formats where they can be.
    """

    def __init__(self, first: Quantized, learned: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(GridRounding(part, learned) for part in first.parts)
        self.shift: nn.Parameter | None = None
        self._first = _without_codes(first)
        if first.parts:
            return
        for name, table in first.tables().items():
            self.register_buffer(name, table)
        if learned and learnable(first.format):
            assert first.scales is not None
            self.shift = nn.Parameter(torch.zeros_like(first.scales))

    @property
    def format(self) -> Format:
        """The format of the first rounding."""
        return self._first.format

    def forward(self, matrix: Tensor) -> Tensor:  # (rows, cols)
        """The values of the nearest codes, float32, differentiable in the matrix and in learned scales."""
        if self.parts:
            rows = self._first.part_rows()
            pieces = [part(matrix[own]) for part, own in zip(self.parts, rows, strict=True)]
            return torch.cat(pieces)[torch.cat(rows).argsort()]
        if self.shift is None:
            return straight_through(matrix, lambda values: dequantize(self.quantized(values)))
        rounded: Tensor = _LearnedStep.apply(matrix, self.shift, self._tables())  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def quantized(self, matrix: Tensor) -> Quantized:
        """The codes and tables of `forward`, for packing."""
        if not self.parts:
            return recode(matrix.detach(), self._tables())
        pairs = zip(self.parts, self._first.part_rows(), strict=True)
        return replace(self._first, parts=tuple(part.quantized(matrix[rows]) for part, rows in pairs))  # type: ignore[operator]

    def _tables(self) -> Quantized:
        tables = self._first.map_tables(lambda name, _: self.get_buffer(name))  # wherever the model has moved to
        if self.shift is None:
            return tables
        assert tables.scales is not None
        return replace(tables, scales=storable_scales(tables.scales * self.shift.detach().exp(), tables.format))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GridRounding":
        """Tables and shifts keep their types in `model.to(dtype)`: they say exactly what is stored."""
        exact = {**dict(self.named_buffers(recurse=False)), **({} if self.shift is None else {"shift": self.shift})}
        kept = {name: tensor.detach() for name, tensor in exact.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != tensor.dtype:
                moved.data = tensor.to(moved.device)
        return self


def _without_codes(quantized: Quantized) -> Quantized:
    parts = tuple(_without_codes(part) for part in quantized.parts)
    return replace(quantized, codes=no_codes(quantized.codes), parts=parts)


class _LearnedStep(torch.autograd.Function):
    """LSQ's gradients (equation 3, section 2.2), the scale's in relative terms.

    With v = element / scale, a scale's gradient sums rounded(v) - v over its elements inside the grid's range and the
    range's end over those outside, times 1 / sqrt(elements of the scale * largest grid value); over the scale itself,
    a step of the shift moves it as far as LSQ moves the scale.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, shift: Tensor, tables: Quantized) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.tables = tables
        return dequantize(recode(matrix, tables))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (matrix,) = ctx.saved_tensors
        slopes, inside, scales, format = _slopes(matrix.detach(), ctx.tables)
        incoming = to_groups(gradient.float(), format)
        step = (incoming * slopes).sum(-1) / scales / (slopes.shape[-1] * format.grid.max) ** 0.5
        passed = from_groups(incoming * inside, format, (matrix.shape[0], matrix.shape[1]))
        return passed.to(matrix.dtype), step, None


def _slopes(matrix: Tensor, tables: Quantized) -> tuple[Tensor, Tensor, Tensor, Format]:
    """Each element's derivative in its scale over that scale's step, whether it is inside the grid's range, and scales.

    Constants of the backward pass: rounding has no second derivative.
    """
    format, scales, minima = tables.format, group_scales(tables), group_minima(tables)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    elements = to_groups(matrix.float(), format)
    if minima is not None:
        elements = elements - minima.unsqueeze(-1)
    elements = elements / scales.unsqueeze(-1)
    zeros = torch.zeros((), dtype=torch.float32) if tables.zeros is None else tables.zeros.unsqueeze(-1).float()
    low, high = format.grid.min - zeros, format.grid.max - zeros
    rounded = snap(elements, format.grid) if tables.zeros is None else elements.round().clamp(low, high)
    inside = (elements >= low) & (elements <= high)
    return torch.where(inside, rounded - elements, rounded), inside, scales, format
