"""Fitted scales raise no row's error, are optimal where a row has one scale, and keep codes and dtypes."""

import pytest
import torch

from mpq.core.formats import FORMATS, parse_format
from mpq.rounding.clip_search import clip_search
from mpq.rounding.gptq import row_errors
from mpq.rounding.reference import dequantize, quantize, storable_scales
from mpq.rounding.scale_fit import fit_scales, fits

FITTED = sorted(name for name, format in FORMATS.items() if fits(format))


def layer(rows=12, cols=160, blocks=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(blocks, 400, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return torch.randn(rows, cols, generator=generator), inputs.mT @ inputs / 400


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("blocks", [1, 3])
def test_fitting_never_raises_a_rows_error_and_keeps_codes(name, blocks):
    weight, hessian = layer(blocks=blocks)
    before = quantize(weight, parse_format(name))
    after = fit_scales(weight, before, hessian)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(storable_scales(after.scales, after.format), after.scales)
    errors, others = row_errors(weight, after, hessian), row_errors(weight, before, hessian)
    assert (errors <= others * (1 + 1e-4)).all()
    if after.format.scale != "e8m0" and after.format.grid.bits < 8:
        assert errors.sum() < others.sum()


def test_the_scale_of_a_row_that_has_one_is_the_best_of_many():
    weight, hessian = layer()
    rounded = clip_search(weight, parse_format("int3-channel-sfp32"))
    fitted = row_errors(weight, fit_scales(weight, rounded, hessian), hessian)
    ratios = torch.linspace(0.5, 1.5, 2001)
    tried = [row_errors(weight, rounded.map_tables(lambda _, scales, r=r: r * scales), hessian) for r in ratios]
    best = torch.stack(tried).amin(0)
    assert (fitted <= best * (1 + 1e-5)).all()
    assert (fitted > 0.99 * best).all()


@pytest.mark.parametrize("name", ["int4-g32-sfp32", "int2-g16-se8m0", "int3-g32-se4m3", "nvfp4"])
def test_each_group_in_turn_takes_its_best_scale(name):
    """Reference: one group after the other by least squares over samples, stored where that lowers the error."""
    weight, _ = layer(rows=6, cols=96)
    inputs = torch.randn(500, 96, generator=torch.Generator().manual_seed(1)) @ torch.randn(96, 96)
    rounded = quantize(weight, parse_format(name))
    scales = rounded.scales.clone()
    width = rounded.format.group_size

    def error(row, numbers):
        return (inputs.double() @ (numbers - weight[row]).double()).square().sum()

    for row in range(6):
        numbers = dequantize(rounded)[row]
        for group, start in enumerate(range(0, 96, width)):
            inside = slice(start, start + width)
            own = inputs[:, inside] @ numbers[inside]
            ratio = own @ (inputs @ (weight[row] - numbers) + own) / (own @ own)
            stored = storable_scales(scales[row, group] * ratio, rounded.format)
            changed = numbers.clone()
            changed[inside] *= stored / scales[row, group]
            if stored != 0 and error(row, changed) < error(row, numbers):
                numbers, scales[row, group] = changed, stored
    fitted = fit_scales(weight, rounded, (inputs.T @ inputs)[None])
    torch.testing.assert_close(fitted.scales, scales, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["int4-tensor", "q4_k", "bf16"])
def test_scales_shared_between_rows_are_not_fitted(name):
    weight, hessian = layer(cols=256)
    rounded = quantize(weight, parse_format(name))
    assert fit_scales(weight, rounded, hessian) is rounded


def test_rows_of_zeros_stay_finite():
    weight, hessian = layer()
    weight[0] = 0
    assert torch.isfinite(dequantize(fit_scales(weight, quantize(weight, parse_format("int4-g32")), hessian))).all()
