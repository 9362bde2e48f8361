"""Learned scales: gradients against the paper's formula, worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize, fake_quantize, quantize, to_groups
from mpq.training.learned import LearnedScales, round_with_scales

FORMATS = ("int2", "int3-channel", "int4-g8", "int8-g5", "fp4-e2m1-g8", "fp8-e4m3-channel", "mxfp4", "nf4-g8")


def matrix(rows=5, cols=19, seed=0):
    return torch.randn(rows, cols, generator=seeded(seed, "matrix", rows, cols))


def by_hand(weight, scales, format, upstream):
    """LSQ's gradients element by element, in plain loops."""
    grid = format.grid
    values = torch.tensor([v for v in grid.values() if v == v], dtype=torch.float64)
    elements, up = to_groups(weight, format).double(), to_groups(upstream, format).double()
    count = elements.shape[-1]
    d_weight, d_scales = torch.zeros_like(elements), torch.zeros(scales.shape, dtype=torch.float64)
    for r in range(elements.shape[0]):
        for g in range(elements.shape[1]):
            s = float(scales[r, g])
            for k in range(count):
                v = float(elements[r, g, k]) / s
                if grid.min <= v <= grid.max:
                    rounded = float(values[(values - v).abs().argmin()])
                    d_weight[r, g, k] = up[r, g, k]
                    d_scales[r, g] += up[r, g, k] * (rounded - v)
                else:
                    d_scales[r, g] += up[r, g, k] * (grid.max if v > 0 else grid.min)
    return d_weight, d_scales / (count * grid.max) ** 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_the_papers(name):
    format = parse_format(name)
    weight = matrix().requires_grad_()
    scales = (quantize(weight, format).scales * 0.6).requires_grad_()  # smaller scales: some elements are clipped
    if format.scale == "e8m0":
        scales = quantize(weight, format).scales.clone().requires_grad_()
    upstream = matrix(seed=1)
    rounded = round_with_scales(weight, scales, format)
    stored = quantize(weight, format, scales=scales.detach())
    torch.testing.assert_close(rounded.detach(), dequantize(stored), rtol=1e-6, atol=0)
    rounded.backward(upstream)
    d_weight, d_scales = by_hand(weight.detach(), stored.scales, format, upstream)
    torch.testing.assert_close(to_groups(weight.grad, format).double(), d_weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(scales.grad.double(), d_scales, rtol=2e-4, atol=1e-5)


def test_a_clipped_elements_scale_gradient_is_the_slope_of_the_output():
    format = parse_format("int3-sfp32")
    weight = torch.tensor([[5.0, -9.0, 7.0]])  # all beyond the ends of the grid, -4 and 3
    scale = torch.tensor([[0.5]], requires_grad=True)

    def output(s):
        return round_with_scales(weight, s, format).sum()

    output(scale).backward()
    slope = (output(scale.detach() + 2**-6) - output(scale.detach() - 2**-6)) / 2**-5
    assert scale.grad.item() * (3 * 3) ** 0.5 == pytest.approx(slope.item(), rel=1e-5)


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(FORMATS))
@settings(max_examples=30, deadline=None)
def test_at_first_they_round_as_a_clip_search(rows, cols, name):
    weight = matrix(rows, cols)
    learned = LearnedScales(weight, parse_format(name))
    torch.testing.assert_close(learned(weight).detach(), dequantize(learned.quantized(weight)), rtol=1e-6, atol=0)
    squared = (learned(weight).detach() - weight).square().sum()
    assert squared <= (fake_quantize(weight, parse_format(name)) - weight).square().sum() * (1 + 1e-5)


def test_training_the_scales_lowers_the_error():
    weight, format = matrix(16, 64), parse_format("int2-channel")
    learned = LearnedScales(weight, format)
    with torch.no_grad():
        learned.scales *= 2
    before = (learned(weight) - weight).square().sum().item()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (learned(weight) - weight).square().sum().backward()
        optimizer.step()
    best = (dequantize(LearnedScales(weight, format).quantized(weight)) - weight).square().sum().item()
    assert before > 1.5 * best
    assert (learned(weight) - weight).square().sum().item() < 1.1 * best


@pytest.mark.parametrize("name", ["int4-g32-asym", "nvfp4", "bf16"])
def test_formats_without_one_level_of_scales_are_refused(name):
    with pytest.raises(MpqError, match="cannot be learned"):
        LearnedScales(matrix(), parse_format(name))
