"""Quantizing: idempotent, within half a step, equal to an exhaustive search of the grid; scales exact in storage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.core.grids import NORMAL_FLOAT_4, SCALES, float_grid, int_grid
from mpq.rounding.codes import (
    decode,
    decode_scales,
    encode,
    encode_by_search,
    encode_scales,
    round_scales,
    snap,
)
from mpq.rounding.reference import dequantize, group_minima, group_scales, quantize, recode, to_groups

GRIDS = [int_grid(2), int_grid(5), int_grid(8), int_grid(4, signed=False), NORMAL_FLOAT_4, SCALES["ue5m3"]]
GRIDS += [float_grid(e, m) for e, m in ((2, 1), (3, 2), (2, 3), (4, 3), (5, 2), (3, 4), (1, 2))]
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 70))
NAMES = st.sampled_from(sorted(FORMATS))


def matrix(shape, seed, spreading=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * np.exp(
        spreading * np.random.default_rng(seed + 1).standard_normal(shape)
    )
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_encode_equals_the_exhaustive_search(grid):
    numbers = torch.tensor([value for value in grid.values() if np.isfinite(value)], dtype=torch.float32).unique()
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    wild = torch.cat([matrix((400,), 7) * scale for scale in (1e-6, 1e-2, 1.0, 30.0, 1e5)])
    values = torch.cat([numbers, midpoints, wild])
    if not grid.signed:
        values = values.abs()
    expected = decode(encode_by_search(values, grid), grid)
    assert torch.equal(decode(encode(values, grid), grid), expected)
    assert torch.equal(snap(values, grid), expected)


@pytest.mark.parametrize(
    ("grid", "dtype"), [(float_grid(4, 3), torch.float8_e4m3fn), (float_grid(5, 2), torch.float8_e5m2)]
)
def test_encode_rounds_as_torch_does(grid, dtype):
    values = torch.cat([matrix((2000,), 3), matrix((2000,), 4) * 1e-3]).clamp(grid.min, grid.max)
    assert torch.equal(decode(encode(values, grid), grid), values.to(dtype).float())


@settings(deadline=None)
@given(NAMES, SIZES, st.integers(0, 2**20))
def test_quantizing_again_with_the_same_scales_changes_nothing(name, shape, seed):
    quantized = quantize(matrix(shape, seed), parse_format(name))
    numbers = dequantize(quantized)
    if quantized.format.is_float_copy:
        again = quantize(numbers, quantized.format)
    else:
        again = recode(numbers, quantized)
    assert torch.equal(dequantize(again), numbers)
    if quantized.format.is_plain and quantized.scales is not None:
        zeros = None if quantized.zeros is None else quantized.zeros.float()
        again = quantize(
            numbers, quantized.format, scales=quantized.scales, zeros=zeros, tensor_scale=quantized.tensor_scale
        )
        assert torch.equal(dequantize(again), numbers)


@settings(deadline=None)
@given(NAMES, SIZES, st.integers(0, 2**20))
def test_error_is_at_most_half_a_step_inside_the_range(name, shape, seed):
    weight = matrix(shape, seed)
    format = parse_format(name)
    if format.is_float_copy:
        return
    quantized = quantize(weight, format)
    scales, minima = group_scales(quantized).unsqueeze(-1), group_minima(quantized)
    lowest = 0 if minima is None else minima.unsqueeze(-1)
    inside = to_groups(torch.ones_like(weight), format).bool() & (scales != 0)  # a zero scale gives its minimum alone
    elements = torch.where(inside, (to_groups(weight, format) - lowest) / scales, 0)
    rounded = torch.where(inside, (to_groups(dequantize(quantized), format) - lowest) / scales, 0)
    offsets = 0 if quantized.zeros is None else quantized.zeros.unsqueeze(-1).float()
    numbers = torch.tensor(sorted({value for value in format.grid.values() if np.isfinite(value)}))
    units = (elements + offsets).double().clamp(numbers[0], numbers[-1])
    upper = numbers[torch.searchsorted(numbers, units).clamp(1, len(numbers) - 1)]
    lower = numbers[torch.searchsorted(numbers, units).clamp(1, len(numbers) - 1) - 1]
    error = (units - (rounded + offsets).double()).abs()
    # Quotients in float32 err by a few roundings, relative to the numbers that a minimum is taken from; the rounding of
    # a zero point adds up to half a step.
    limit = (upper - lower) / 2 * (2 if format.zero_point else 1) + 1e-5 * numbers.abs().max()
    assert (error <= limit + torch.where(inside, 1e-6 * (lowest / scales).abs(), 0))[inside].all()


@pytest.mark.parametrize("kind", SCALES)
def test_scales_survive_storage(kind):
    scales = round_scales(torch.exp(matrix((1000,), 5) * 2), kind)
    assert torch.equal(decode_scales(encode_scales(scales, kind), kind), scales)


@pytest.mark.parametrize("kind", SCALES)
def test_scales_are_never_zero_or_infinite(kind):
    scales = round_scales(torch.tensor([0.0, 1e-38, 1e38]), kind)
    assert scales[0] == 1
    assert ((scales > 0) & torch.isfinite(scales)).all()


def test_mxfp4_by_hand():
    """MX 6.3: absmax 5 has exponent 2, e2m1's largest exponent is 2: the scale is 1, and 5 goes to 4 (tie to even)."""
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([5.0, -0.3, 2.6, 0.24])
    quantized = quantize(row, parse_format("mxfp4"))
    assert quantized.scales.item() == 1
    assert dequantize(quantized)[0, :4].tolist() == [4.0, -0.5, 3.0, 0.0]


def test_nvfp4_by_hand():
    """The tensor scale is absmax / (6 * 448), rounded up to a power of two; scales then are at most 448."""
    row = torch.cat([torch.full((1, 16), 6.0), torch.full((1, 16), 0.75)], dim=1)
    quantized = quantize(row, parse_format("nvfp4"))
    assert quantized.tensor_scale.item() == 2**-8
    assert quantized.scales.tolist() == [[256.0, 32.0]]
    assert quantize(row * 448 / 512, parse_format("nvfp4")).tensor_scale.item() == 2**-9
    assert torch.allclose(dequantize(quantized), row)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_constant_and_empty_weights(name):
    format = parse_format(name)
    assert torch.equal(dequantize(quantize(torch.zeros(3, 40), format)), torch.zeros(3, 40))
    constant = torch.full((3, 40), -0.37)
    assert torch.allclose(dequantize(quantize(constant, format)), constant, rtol=0.34)
    assert dequantize(quantize(torch.zeros(0, 40), format)).shape == (0, 40)
    assert dequantize(quantize(torch.zeros(3, 0), format)).shape == (3, 0)


@pytest.mark.parametrize("bad", [torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]])])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(MpqError, match="NaN or infinite"):
        quantize(bad, parse_format("int4-g128"))


def test_a_weight_must_be_a_float_matrix():
    with pytest.raises(MpqError, match="rows, cols"):
        quantize(torch.zeros(2, 3, 4), parse_format("int4-g128"))


@pytest.mark.parametrize("name", ["int3-g32-asym", "nvfp4", "mxfp4", "q4_k", "int8-tensor", "fp8-e4m3-channel"])
def test_large_weights_are_decoded_in_parts_alike(name, monkeypatch):
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, parse_format(name))
    whole = dequantize(quantized)
    monkeypatch.setattr("mpq.core.pieces.PIECE", 5 * 256)
    assert torch.equal(dequantize(quantized), whole)
