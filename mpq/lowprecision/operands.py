"""Operands of a product, rounded in tiles that share a scale, and the gradient through that rounding."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.formats import Format
from mpq.core.grids import SCALES
from mpq.lowprecision.recipe import Recipe
from mpq.lowprecision.relaxation import rounding_slope
from mpq.rounding.codes import COPY_DTYPES, decode, encode, round_scales, snap, to_float_copy
from mpq.rounding.reference import absmax_scales, from_groups, real_scales, tensor_scale_of, to_groups
from mpq.rounding.stochastic import stochastic_round


def round_operand(
    matrix: Tensor,  # (rows, summed dimension)
    format: Format,
    *,
    convention: str = "divide",
    scale_rounding: str = "nearest",
    square: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The matrix rounded for a product, float32; stochastically when a generator is given."""
    if format.is_float_copy:
        return to_float_copy(matrix, format.grid.name).float()
    tiles = to_tiles(matrix.float(), format, square)
    scales = divisors(tiles, format, convention, scale_rounding)
    elements = tiles / scales
    if generator is None:
        rounded = snap(elements, format.grid)
    else:
        rounded = stochastic_round(elements, format.grid, generator)
    return from_tiles(rounded * scales, format, (matrix.shape[0], matrix.shape[1]), square)


def operand_gradient(
    matrix: Tensor,  # (rows, summed dimension), before rounding
    rounded: Tensor,  # the same, as it was rounded
    upstream: Tensor,  # the same, gradient by the rounded operand
    format: Format,
    recipe: Recipe,
    square: bool = False,
) -> Tensor:
    """Gradient by the unrounded operand: f(X) = s(X) Q(X / s(X)) with the recipe's Q' and s' (Proposition 1).

    The rounding of scales has the identity as its gradient, and the scale of the tensor cancels.
    """
    if format.is_float_copy or recipe.plain_gradient:
        return upstream
    tiles, gradient = (to_tiles(part.float(), format, square) for part in (matrix, upstream))
    scales = divisors(tiles, format, recipe.convention, recipe.scale_rounding)
    elements = tiles / scales
    slope = rounding_slope(elements, format.grid, recipe.relaxation, recipe.steepness)
    result = gradient * slope
    if recipe.scale_gradient != "none":
        values = to_tiles(rounded, format, square) / scales
        by_scale = (gradient * (values - elements * slope)).sum(-1, keepdim=True)
        result = result + by_scale * elements.sign() * _share(elements, recipe.scale_gradient) / format.grid.max
    return from_tiles(result, format, (matrix.shape[0], matrix.shape[1]), square)


def _share(elements: Tensor, scale_gradient: str) -> Tensor:
    """Share of a scale's gradient that reaches each element, (tiles, elements), sums of one."""
    sizes = elements.abs()
    if scale_gradient == "softmax":
        return sizes.softmax(-1)
    return functional.one_hot(sizes.argmax(-1), sizes.shape[-1]).to(sizes)


def divisors(
    tiles: Tensor,  # (tiles, elements)
    format: Format,
    convention: str = "divide",
    scale_rounding: str = "nearest",
) -> Tensor:
    """The stored scale of each tile as the divisor of its elements, float32 (tiles, 1).

    In the reciprocal convention the tensor scale maps the tensor's largest element to the grid's end: multipliers of
    tiles with smaller elements are larger. Rounding up never clips: a stored multiplier is then rounded down.
    """
    tiles = tiles.detach().float()
    absmax = tiles.abs().amax(-1, keepdim=True)
    if convention == "reciprocal":
        return _reciprocals(absmax, format, scale_rounding)
    tensor_scale = tensor_scale_of(tiles, format)
    if scale_rounding == "nearest":
        rowwise = replace(format, granularity="channel", group_size=0)
        return real_scales(absmax_scales(tiles, rowwise, tensor_scale)[0], tensor_scale)
    exact = (absmax if tensor_scale is None else absmax / tensor_scale) / format.grid.max
    return real_scales(round_directed(exact, format.scale, 1), tensor_scale)


def _reciprocals(absmax: Tensor, format: Format, scale_rounding: str) -> Tensor:
    tensor_scale = absmax.max() / format.grid.max if format.tensor_scale else absmax.new_ones(())
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, torch.ones_like(tensor_scale))
    # A tile of zeros may have any multiplier; every type holds 1.
    multiplier = torch.where(absmax > 0, format.grid.max * tensor_scale / absmax, torch.ones_like(absmax))
    multiplier = multiplier.clamp(max=SCALES[format.scale].max)
    if scale_rounding == "up":
        return tensor_scale / round_directed(multiplier, format.scale, -1)
    return tensor_scale / round_scales(multiplier, format.scale)


def round_directed(scales: Tensor, kind: str, direction: int) -> Tensor:
    """Positive scales rounded to their type, up (1) or down (-1), within its range; zero becomes 1; float32."""
    nearest, grid = round_scales(scales, kind), SCALES[kind]
    if kind in COPY_DTYPES:
        stored = nearest.to(COPY_DTYPES[kind])
        bits = stored.view(torch.int32 if kind == "fp32" else torch.int16) + direction
        neighbour = bits.view(stored.dtype).float()
    else:
        codes = encode(nearest, grid).int() + direction
        neighbour = decode(codes.clamp(0, 2**grid.bits - 1), grid)
    wrong = nearest < scales if direction > 0 else nearest > scales
    beyond = nearest >= grid.max if direction > 0 else nearest <= grid.smallest
    return torch.where(wrong & ~beyond & (scales > 0), neighbour, nearest)


def to_tiles(matrix: Tensor, format: Format, square: bool = False) -> Tensor:
    """(rows, cols) as (tiles, elements that share a scale), zeros where a tile reaches beyond the matrix."""
    if not square:
        return to_groups(matrix, format).flatten(0, 1)
    size, (rows, cols) = format.group_size, matrix.shape
    tiles = functional.pad(matrix, (0, -cols % size, 0, -rows % size))
    high, wide = len(tiles) // size, tiles.shape[1] // size
    return tiles.view(high, size, wide, size).transpose(1, 2).reshape(high * wide, size * size)


def from_tiles(tiles: Tensor, format: Format, shape: tuple[int, int], square: bool = False) -> Tensor:
    """The inverse of `to_tiles`."""
    rows, cols = shape
    if not square:
        grouped = tiles.view(-1, format.groups(cols), tiles.shape[1]) if format.granularity == "group" else tiles
        return from_groups(grouped, format, shape)
    size = format.group_size
    high, wide = -(-rows // size), -(-cols // size)
    whole: Tensor = tiles.view(high, wide, size, size).transpose(1, 2).reshape(high * size, wide * size)
    return whole[:rows, :cols]
