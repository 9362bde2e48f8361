"""Integer scales and minima of super-blocks: real tables are rounded to the integers of least squared error."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.grids import INTEGER_SCALES
from mpq.rounding.codes import round_scales, snap
from mpq.rounding.reference import Quantized, recode, round_in_units, to_groups

LADDER = (0.97, 0.94, 0.9, 0.85, 1.04)  # further units to try, relative to the one derived from the largest scale
ROUNDS = 2
TINY = 1e-30


@dataclass(frozen=True)
class Tables:
    """Integers (rows, groups) and their units (rows, super-blocks); zeros where a format has no minima."""

    scales: Tensor
    scale_units: Tensor
    minima: Tensor
    minimum_units: Tensor


def settle(
    weight: Tensor,  # (rows, cols)
    weights: Tensor,  # (rows, groups, elements of a group) of the squared errors
    scales: Tensor,  # (rows, groups), real numbers
    minima: Tensor | None,  # the same, at most zero
    start: Quantized,  # the fallback
) -> Quantized:
    """Quantize the weight in the super-block format of `start`, near the given scales and minima.

    Tries a ladder of units; then moves groups to neighbouring integers, and units to their least-squares fit, as long
    as the error falls. The error is never above that of `start`.
    """
    format = start.format
    state = _State(to_groups(weight, format), weights, start)
    state.offer_ladder(scales, minima)
    for _ in range(ROUNDS):
        state.move_integers()
        state.refit_units()
    best = state.best
    settled = replace(start, scales=best.scales, super_scales=best.scale_units)
    if format.minimum:
        settled = replace(settled, minima=best.minima, super_minima=best.minimum_units)
    return recode(weight, settled)


class _State:
    """The best tables so far and the error of each group."""

    def __init__(self, elements: Tensor, weights: Tensor, start: Quantized) -> None:
        assert start.scales is not None
        assert start.super_scales is not None
        self.elements, self.weights, self.format = elements, weights, start.format
        minima = torch.zeros_like(start.scales) if start.minima is None else start.minima
        minimum_units = torch.zeros_like(start.super_scales) if start.super_minima is None else start.super_minima
        self.best = Tables(start.scales, start.super_scales, minima, minimum_units)
        self.errors, _ = self.measure(self.best)

    def measure(self, tables: Tables) -> tuple[Tensor, Tensor]:
        """Squared error of every group (rows, groups), and the values of the codes."""
        scales = (tables.scales * self.of_groups(tables.scale_units)).unsqueeze(-1)
        heights = self.elements
        if self.format.minimum:
            heights = heights - (tables.minima * self.of_groups(tables.minimum_units)).unsqueeze(-1)
        units = snap(heights / torch.where(scales == 0, torch.ones_like(scales), scales), self.format.grid)
        return (units * scales).sub_(heights).square_().mul_(self.weights).sum(-1), units

    def of_groups(self, table: Tensor) -> Tensor:
        """(rows, super-blocks) repeated for every group."""
        return table.repeat_interleave(self.format.super_group, 1)[:, : self.elements.shape[1]]

    def sums(self, table: Tensor) -> Tensor:
        """(rows, groups) summed over super-blocks."""
        size = self.format.super_group
        return functional.pad(table, (0, -table.shape[1] % size)).reshape(len(table), -1, size).sum(-1)

    def offer(self, tables: Tables) -> None:
        """Keep the tables in the super-blocks where they have a smaller error."""
        errors, _ = self.measure(tables)
        better = self.sums(errors) < self.sums(self.errors)
        self.keep(tables, errors, self.of_groups(better), better)

    def keep(self, tables: Tables, errors: Tensor, groups: Tensor, blocks: Tensor) -> None:
        """Replace the tables where they are better, by group and by super-block."""
        old = self.best
        self.best = Tables(
            torch.where(groups, tables.scales, old.scales),
            torch.where(blocks, tables.scale_units, old.scale_units),
            torch.where(groups, tables.minima, old.minima),
            torch.where(blocks, tables.minimum_units, old.minimum_units),
        )
        self.errors = torch.where(groups, errors, self.errors)

    def offer_ladder(self, scales: Tensor, minima: Tensor | None) -> None:
        """Offer the integers nearest to real scales and minima, for several units of the scales, then of the minima."""
        whole, units = round_in_units(scales, self.format.scale, self.format.super_group)
        first = replace(self.best, scales=whole, scale_units=units)
        if minima is not None:
            lowest, heights = round_in_units(minima, self.format.minimum, self.format.super_group)
            first = replace(first, minima=lowest, minimum_units=heights)
        self.offer(first)
        for ratio in LADDER:
            step = round_scales(units * ratio, "fp16")
            self.offer(replace(first, scales=self._nearest(scales, step, self.format.scale), scale_units=step))
        if minima is None:
            return
        for ratio in LADDER:
            step = round_scales(heights * ratio, "fp16")
            lowest = self._nearest(minima, step, self.format.minimum)
            self.offer(replace(self.best, minima=lowest, minimum_units=step))

    def _nearest(self, free: Tensor, units: Tensor, kind: str) -> Tensor:
        grid = INTEGER_SCALES[kind]
        return (free / self.of_groups(units)).round().clamp(grid.min, grid.max)

    def move_integers(self) -> None:
        """Offer every group its neighbouring scales, each with its best minimum."""
        grid, centre = INTEGER_SCALES[self.format.scale], self.best.scales
        for step in (0, -1, 1):
            moved = replace(self.best, scales=(centre + step).clamp(grid.min, grid.max))
            units = self._offer_groups(moved)
            if self.format.minimum:
                slopes = units * (moved.scales * self.of_groups(moved.scale_units)).unsqueeze(-1)
                rest = (self.elements - slopes).mul_(self.weights).sum(-1) / self.weights.sum(-1).clamp(min=TINY)
                fitting = self._nearest(rest, moved.minimum_units, self.format.minimum)
                self._offer_groups(replace(moved, minima=fitting))

    def _offer_groups(self, tables: Tables) -> Tensor:
        """Keep the integers in the groups where they have a smaller error; return the values of all codes."""
        errors, units = self.measure(tables)
        self.keep(tables, errors, errors < self.errors, torch.zeros_like(tables.scale_units, dtype=torch.bool))
        return units

    def refit_units(self) -> None:
        """Offer the units of scales and minima that fit the codes best, together, by least squares."""
        best = self.best
        _, units = self.measure(best)
        slopes, ones = units * best.scales.unsqueeze(-1), best.minima.unsqueeze(-1)
        weighted = slopes * self.weights
        power, fit = (self.sums((weighted * other).sum(-1)).double() for other in (slopes, self.elements))
        if not self.format.minimum:
            self.offer(replace(best, scale_units=_quotient(fit, power, best.scale_units)))
            return
        weighted_ones = ones * self.weights
        cross, ones_power, ones_fit = (
            self.sums((weighted_ones * other).sum(-1)).double() for other in (slopes, ones, self.elements)
        )
        determinant = power * ones_power - cross.square()
        determinant = torch.where(determinant > 1e-6 * power * ones_power, determinant, torch.zeros_like(determinant))
        scale_units = _quotient(fit * ones_power - ones_fit * cross, determinant, best.scale_units)
        minimum_units = _quotient(ones_fit * power - fit * cross, determinant, best.minimum_units)
        self.offer(replace(best, scale_units=scale_units, minimum_units=minimum_units))


def _quotient(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    """above / below rounded to float16, or `otherwise` where `below` is not positive."""
    quotient = torch.where(below > 0, above / below.clamp(min=TINY), otherwise.double()).float()
    return round_scales(torch.where(quotient == 0, otherwise, quotient), "fp16")
