"""Learned step sizes (LSQ, arXiv 1902.08153): the scales of a weight as parameters."""

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.rounding import method_named
from mpq.rounding.activations import straight_through
from mpq.rounding.reference import Quantized, from_groups, quantize, round_scales, snap, to_groups


def round_with_scales(
    matrix: Tensor,  # (rows, cols)
    scales: Tensor,  # (rows, groups), or (1, 1) for the tensor
    format: Format,
) -> Tensor:
    """The matrix on the format's grid, differentiable in both arguments.

    The gradient with respect to an element is the identity inside the grid's range and zero outside. With respect to a
    scale it sums, over its elements v = weight / scale, rounded(v) - v inside the range and the range's end outside
    (LSQ, equation 3); it is multiplied by 1 / sqrt(elements of a scale * largest grid value) (section 2.2).
    """
    elements = to_groups(matrix, format)
    gradient_scale = float(elements.shape[-1] * format.grid.max) ** -0.5
    slowed = scales * gradient_scale + (scales - scales * gradient_scale).detach()
    steps = straight_through(slowed, lambda values: round_scales(values, format.scale)).unsqueeze(-1)
    inside = (elements / steps).clamp(format.grid.min, format.grid.max)
    rounded = straight_through(inside, lambda values: snap(values, format.grid))
    return from_groups(rounded * steps, format, (matrix.shape[0], matrix.shape[1]))


class LearnedScales(nn.Module):
    """Learned scales of one weight in one format, initialized by clip search.

    Raises:
        MpqError: a format with zero points, minima, a second level of scales, or no scales at all.
    """

    def __init__(self, matrix: Tensor, format: Format) -> None:
        super().__init__()
        if format.zero_point or format.tensor_scale or format.is_float_copy or not format.is_plain:
            raise MpqError(
                f"scales of {format.name} cannot be learned: only symmetric formats with one level of scales"
            )
        self.format = format
        scales = method_named("mse")(matrix.detach(), format, None).scales
        assert scales is not None
        self.scales = nn.Parameter(scales.clone())

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix on the grid."""
        return round_with_scales(matrix, self.scales, self.format).to(matrix.dtype)

    @torch.no_grad()
    def quantized(self, matrix: Tensor) -> Quantized:
        """The codes and scales of `forward`, for packing."""
        return quantize(matrix, self.format, scales=self.scales)
