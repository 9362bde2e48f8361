"""Refitting scales to fixed codes, for a smaller output error dw H dw^T."""

from dataclasses import replace

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.rounding.reference import Quantized, dequantize, group_scales, storable_scales


def fit_scales(
    weight: Tensor,  # (rows, cols)
    quantized: Quantized,
    hessian: Tensor,  # (blocks, cols, cols), each for as many rows
) -> Quantized:
    """The codes with scales of smaller dw H dw^T in every row, dw being the row's error.

    One sweep of coordinate descent: each group in turn takes its best scale given the row's other scales, rounded to
    the scale's type, unless the current one is better. No row's error rises. Scales of whole tensors and of
    super-blocks are unchanged.
    """
    if not fits(quantized.format) or not weight.numel():
        return quantized
    assert quantized.scales is not None
    (_, cols), blocks = weight.shape, len(hessian)
    unit = 1.0 if quantized.tensor_scale is None else quantized.tensor_scale
    plain = replace(quantized, scales=torch.ones_like(quantized.scales), tensor_scale=None, minima=None)
    units = dequantize(plain).reshape(blocks, -1, cols)
    slopes = (dequantize(quantized) - weight.float()).reshape(blocks, -1, cols) @ hessian
    factors = group_scales(quantized).reshape(blocks, -1, quantized.scales.shape[1])
    scales = quantized.scales.reshape(factors.shape).clone()
    width = quantized.format.group_size or cols
    for group, start in enumerate(range(0, cols, width)):
        inside, later = slice(start, min(start + width, cols)), slice(min(start + width, cols), cols)
        own, old = units[..., inside], factors[..., group]
        slope = (slopes[..., inside] * own).sum(-1)
        curvature = ((own @ hessian[:, inside, inside]) * own).sum(-1)
        best = old - slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        stored = storable_scales(best / unit, quantized.format)
        change = stored * unit - old
        better = (change * (2 * slope + change * curvature) < 0) & (stored != 0) & torch.isfinite(stored)
        scales[..., group] = torch.where(better, stored, scales[..., group])
        moved = torch.where(better, change, torch.zeros_like(change)).unsqueeze(-1) * own
        slopes[..., later] += moved @ hessian[:, inside, later]
    return replace(quantized, scales=scales.reshape(quantized.scales.shape))


def fits(format: Format) -> bool:
    """Whether each group of a row has an independent scale."""
    return format.granularity in ("group", "channel") and not format.super_group and not format.is_float_copy
