"""Recipes of training in few bits: how operands of matrix products are rounded."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format
from mpq.core.grids import SCALES
from mpq.rounding.reference import absmax_scales, decode, encode, real_scales, round_scales, tensor_scale_of, to_groups
from mpq.rounding.stochastic import stochastic_round

WHERE = ("none", "forward", "backward", "all")
CONVENTIONS = ("divide", "reciprocal")


@dataclass(frozen=True)
class Recipe:
    """The options of FP4 training (arXiv 2509.17791, section 3).

    format: of both operands, groups along the summed dimension ("mxfp4", "nvfp4", "fp4-e2m1-g16-sue5m3-ts").
    stochastic: products whose gradient (backward) or both operands (forward) are rounded stochastically.
    hadamard: products whose operands are rotated first.
    square_weights: scales of square tiles of a weight, so that both its products see the same values.
    convention: "divide" stores absmax / largest element and divides by it, as NVFP4 and MX do; "reciprocal" stores
        largest element / absmax and multiplies, as the paper's code does.
    """

    format: str
    stochastic: str = "none"
    hadamard: str = "none"
    square_weights: bool = False
    convention: str = "divide"
    rotation_block: int = 16

    def __post_init__(self) -> None:
        for field in ("stochastic", "hadamard"):
            if getattr(self, field) not in WHERE:
                raise MpqError(f"{field} is one of {', '.join(WHERE)}, not {getattr(self, field)!r}")
        if self.convention not in CONVENTIONS:
            raise MpqError(f"convention is one of {', '.join(CONVENTIONS)}, not {self.convention!r}")
        format = parse_format(self.format)
        if format.zero_point or format.grid.bits > 8:
            raise MpqError(f"invalid training format: expected a symmetric one of up to 8 bits, not {self.format}")
        if self.square_weights and format.granularity != "group":
            raise MpqError(f"square tiles need a format with groups, not {self.format}")

    def rounds_stochastically(self, backward: bool) -> bool:
        """Whether operands of this direction's products are rounded stochastically."""
        return self.stochastic in ("all", "backward" if backward else "forward")

    def rotates(self, backward: bool) -> bool:
        """Whether operands of this direction's products are rotated."""
        return self.hadamard in ("all", "backward" if backward else "forward")


def round_operand(
    matrix: Tensor,  # (rows, summed dimension)
    format: Format,
    *,
    convention: str = "divide",
    square: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The matrix rounded for a product, float32; stochastically when a generator is given."""
    scales = divisors(matrix, format, convention, square)
    elements = matrix.float() / scales
    if generator is None:
        return decode(encode(elements, format.grid), format.grid) * scales
    return stochastic_round(elements, format.grid, generator) * scales


def divisors(matrix: Tensor, format: Format, convention: str = "divide", square: bool = False) -> Tensor:
    """The divisor of each element before rounding, (rows, cols): the stored scales, expanded.

    In the reciprocal convention the tensor scale maps the tensor's largest element to the grid's end: multipliers of
    blocks with smaller elements are larger.
    """
    rows, cols = matrix.shape
    if square:
        size = format.group_size
        tiles = functional.pad(matrix, (0, -cols % size, 0, -rows % size))
        tiles = tiles.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(1)  # type: ignore[no-untyped-call]
        whole = divisors(tiles, replace(format, group_size=size * size), convention)[:, :: size * size]
        return whole.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :cols]
    matrix = matrix.detach().float()
    if convention == "divide":
        tensor_scale = tensor_scale_of(matrix, format)
        scales, _ = absmax_scales(matrix, format, tensor_scale)
        scales = real_scales(scales, tensor_scale)
    else:
        scales = _reciprocals(matrix, format)
    if format.granularity == "group":
        return scales.repeat_interleave(format.group_size, 1)[:, :cols]
    return scales.expand(rows, cols)


def _reciprocals(matrix: Tensor, format: Format) -> Tensor:
    absmax = to_groups(matrix, format).abs().amax(-1)
    tensor_scale = absmax.max() / format.grid.max if format.tensor_scale else absmax.new_ones(())
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, torch.ones_like(tensor_scale))
    # A block of zeros may have any multiplier; every type holds 1.
    multiplier = torch.where(absmax > 0, format.grid.max * tensor_scale / absmax, torch.ones_like(absmax))
    return tensor_scale / round_scales(multiplier.clamp(max=SCALES[format.scale].max), format.scale)
