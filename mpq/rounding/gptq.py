"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, compensating each error in later columns."""

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.grids import Grid
from mpq.core.pieces import rows_at_once
from mpq.rounding import compiled
from mpq.rounding.clip_search import clip_search
from mpq.rounding.codes import decode, encode
from mpq.rounding.reference import (
    Quantized,
    dequantize,
    from_groups,
    group_minima,
    group_scales,
    stacked,
    to_groups,
)
from mpq.rounding.scale_fit import fit_scales

BLOCK = 128  # columns whose corrections are applied to the rest in one product (section 3.3, step 2)


def gptq(
    weight: Tensor,  # (rows, cols)
    format: Format,
    second_moment: Tensor
    | None = None,  # (cols, cols), or (conv groups, cols, cols); any positive multiple of E[x x^T]
    *,
    damping: float = 0.01,
) -> Quantized:
    """Codes of small output error: sum over rows of dw H dw^T, with H the inputs' second moment.

    Scales come first, from a clip search, so that columns can be taken in order of falling diagonal of H without
    changing groups. Every row gets the better of GPTQ's and that search's codes by dw (H + damping) dw^T, and then the
    scales that fit these codes (`mpq.rounding.scale_fit`). Without a second moment this is clip search.

    Raises:
        MpqError: a second moment of another shape, or not finite.
    """
    if second_moment is None or format.is_float_copy or weight.numel() == 0:
        return clip_search(weight, format)
    rows, cols = weight.shape
    hessian = second_moment.detach().float().reshape(-1, second_moment.shape[-1], second_moment.shape[-1])
    if hessian.shape[-1] != cols or rows % hessian.shape[0] or not bool(torch.isfinite(hessian).all()):
        raise MpqError(
            f"invalid second moment for GPTQ: expected finite ({cols}, {cols}) for a weight {(rows, cols)}, "
            f"not one of shape {tuple(second_moment.shape)}"
        )
    parts = _parts(weight, format, len(hessian))
    if len(parts) > 1:
        return stacked([gptq(part, format, second_moment, damping=damping) for part in parts])
    weight = weight.detach().float()
    start = clip_search(weight, format, importance=_importance(hessian, rows))
    factor = _factor(second_moment, damping)
    codes, errors = _compensate(weight, start, factor)
    others = row_errors(weight, start, hessian)
    others += factor.ridge.repeat_interleave(rows // len(hessian)) * (dequantize(start) - weight).square().sum(-1)
    rounded = replace(start, codes=torch.where(_better(errors, others, format).unsqueeze(-1), codes, start.codes))
    return fit_scales(weight, rounded, _damped(hessian, factor.ridge))


def _better(errors: Tensor, others: Tensor, format: Format) -> Tensor:
    """Which rows have the smaller error; all or none where rows share a scale. (rows,)."""
    return errors < others if format.granularity != "tensor" else (errors.sum() < others.sum()).expand_as(errors)


def _parts(weight: Tensor, format: Format, blocks: int) -> tuple[Tensor, ...]:
    """The weight in rows that are rounded at once; whole where rows share a scale or a product."""
    if format.granularity == "tensor" or format.tensor_scale or blocks > 1:
        return (weight,)
    return torch.split(weight, rows_at_once(weight.shape[1]))


def row_errors(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """dw H dw^T of each row: the squared error of the layer's outputs, summed over the samples in H. (rows,)."""
    difference = (dequantize(quantized) - weight.float()).reshape(hessian.shape[0], -1, hessian.shape[-1])
    return (difference @ hessian).mul_(difference).sum(-1).flatten()


def _importance(hessian: Tensor, rows: int) -> Tensor:
    """Weights (rows, cols) of the squared errors by which scales are chosen: the root of H's diagonal.

    Errors of large inputs count more, but much of them is compensated in other columns
    (`experiments/benchmarks/bench_importance`).
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    floor = 1e-4 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return (diagonal + floor).sqrt().repeat_interleave(rows // len(diagonal), 0)


@dataclass(frozen=True)
class Factor:
    """Factors of a damped second moment, in `blocks` of columns processed in `order`."""

    order: Tensor  # (blocks, cols)
    inverse: Tensor  # upper factor of its inverse, (blocks, cols, cols)
    ridge: Tensor  # what damping added to its diagonal, (blocks,)


class _Last:
    """Cache of the last second moment's factor, since a layer is rounded in one format after another."""

    moment: "weakref.ref[Tensor] | None" = None
    version, damping = -1, 0.0
    factor: Factor | None = None


def _factor(second_moment: Tensor, damping: float) -> Factor:
    last = _Last.moment() if _Last.moment is not None else None
    cached = _Last.factor
    if last is second_moment and cached and (_Last.version, _Last.damping) == (second_moment._version, damping):
        return cached
    hessian = second_moment.detach().float().reshape(-1, second_moment.shape[-1], second_moment.shape[-1])
    order = hessian.diagonal(dim1=1, dim2=2).argsort(-1, descending=True)
    picked = torch.gather(hessian, 1, order.unsqueeze(-1).expand_as(hessian))
    picked = torch.gather(picked, 2, order.unsqueeze(1).expand_as(hessian))
    cached = Factor(order, *_inverse_factor(picked, damping))
    _Last.moment, _Last.version, _Last.damping = weakref.ref(second_moment), second_moment._version, damping
    _Last.factor = cached
    return cached


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse and the ridge, which grows tenfold until the factorization succeeds."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    for power in range(6):
        ridge = mean * max(damping * 10**power, 0.01 if power else 0.0)
        factor, failed = torch.linalg.cholesky_ex(_damped(hessian, ridge))
        if not bool(failed.any()):
            inverse: Tensor
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed.any()):
                return inverse, ridge
    raise MpqError(
        "the second moment for GPTQ is not positive definite even with heavy damping: use more calibration data"
    )


def _damped(hessian: Tensor, ridge: Tensor) -> Tensor:  # (blocks, cols, cols), (blocks,)
    return hessian + torch.diag_embed(ridge.unsqueeze(-1).expand(hessian.shape[:2]))


def _compensate(weight: Tensor, start: Quantized, factor: Factor) -> tuple[Tensor, Tensor]:
    """GPTQ's codes (rows, cols), with the scales of `start`, and each row's dw (H + ridge) dw^T (rows,)."""
    order, inverse = factor.order, factor.inverse
    blocks, cols = order.shape

    def arrange(matrix: Tensor) -> Tensor:
        matrix = matrix.reshape(blocks, -1, cols)
        return torch.gather(matrix, 2, order.unsqueeze(1).expand_as(matrix))

    pending = arrange(weight)
    scales, lowest = (arrange(table) for table in _elementwise(start))
    codes = pending.new_empty(pending.shape, dtype=torch.uint8)
    squares = pending.new_zeros(pending.shape[:2])
    grid = start.format.grid
    round_block = compiled.gptq_block if compiled.serves(grid, pending, inverse) else gptq_block
    for first in range(0, cols, BLOCK):
        last = min(first + BLOCK, cols)
        for block in range(blocks):
            part = (block, slice(None), slice(first, last))
            errors = round_block(
                pending[part], scales[part], lowest[part], inverse[block, first:last, first:last], codes[part], grid
            )
            squares[block] += errors.square().sum(-1)
            pending[block, :, last:] -= errors @ inverse[block, first:last, last:]
    placed = torch.empty_like(codes)
    placed.scatter_(2, order.unsqueeze(1).expand_as(codes), codes)
    return placed.reshape(weight.shape), squares.flatten()


def gptq_block(
    pending: Tensor,  # (rows, width), changed in place
    scales: Tensor,  # (rows, width)
    lowest: Tensor,  # (rows, width)
    inverse: Tensor,  # (width, width)
    codes: Tensor,  # uint8 (rows, width), written
    grid: Grid,
) -> Tensor:
    """The reference of `compiled.gptq_block`, bit for bit: round column by column, the errors (rows, width)."""
    errors = torch.empty_like(pending)
    for column in range(pending.shape[1]):
        scale = scales[:, column]
        target = pending[:, column] - lowest[:, column]
        code = encode(target / torch.where(scale == 0, torch.ones_like(scale), scale), grid)
        codes[:, column] = code
        error = (target - decode(code, grid) * scale) / inverse[column, column]
        pending[:, column + 1 :] -= error.unsqueeze(-1) * inverse[column, column + 1 :]
        errors[:, column] = error
    return errors


def _elementwise(start: Quantized) -> tuple[Tensor, Tensor]:
    """Factor and offset of each element's code, both (rows, cols)."""
    scales, minima = group_scales(start), group_minima(start)
    template = to_groups(scales.new_ones(start.shape), start.format)
    if start.zeros is not None:
        minima = -scales * start.zeros
    if minima is None:
        minima = torch.zeros_like(scales)
    factors, lowest = (
        from_groups(table.unsqueeze(-1).expand_as(template), start.format, start.shape) for table in (scales, minima)
    )
    return factors, lowest
