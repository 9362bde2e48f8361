"""Learned scales: gradients against the paper's formula, computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.formats import parse_format
from mpq.network.calibration import seeded
from mpq.rounding import method_named
from mpq.rounding.clip_search import clip_search
from mpq.rounding.learned import GridRounding
from mpq.rounding.mixed import in_format
from mpq.rounding.reference import dequantize, fake_quantize, quantize, to_groups
from tests.mixes import random_mix

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
    first = quantize(weight, format)
    if format.scale != "e8m0":
        first = quantize(weight, format, scales=first.scales * 0.6)  # smaller scales: some elements are clipped
    learned, upstream = GridRounding(first, learned=True), matrix(seed=1)
    rounded = learned(weight)
    assert torch.equal(rounded.detach(), dequantize(first))
    rounded.backward(upstream)
    d_weight, d_scales = by_hand(weight.detach(), first.scales, format, upstream)
    torch.testing.assert_close(to_groups(weight.grad, format).double(), d_weight, rtol=1e-6, atol=0)
    relative = learned.shift.grad.double() * first.scales
    torch.testing.assert_close(relative, d_scales, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int3-sfp32", "int3-channel-asym-sfp32"])
def test_a_clipped_elements_scale_gradient_is_the_slope_of_the_output(name):
    format = parse_format(name)
    weight = torch.tensor([[5.0, -9.0, 7.0]])  # all beyond the ends of the grid
    zeros = torch.tensor([[2.0]]) if format.zero_point else None
    first = quantize(weight, format, scales=torch.tensor([[0.5]]), zeros=zeros)
    learned = GridRounding(first, learned=True)

    def output(shift):
        with torch.no_grad():
            learned.shift.fill_(shift)
        return learned(weight).sum()

    slope = (output(2**-10).item() - output(-(2**-10)).item()) / 2**-9  # of exp(shift) * scale
    output(0.0).backward()
    scale = float(first.scales)
    assert learned.shift.grad.item() * scale**2 * (3 * format.grid.max) ** 0.5 == pytest.approx(slope, rel=1e-4)


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(FORMATS))
@settings(max_examples=30, deadline=None)
def test_at_first_they_round_as_a_clip_search(rows, cols, name):
    weight = matrix(rows, cols)
    learned = GridRounding(clip_search(weight, parse_format(name)), learned=True)
    assert torch.equal(learned(weight).detach(), dequantize(learned.quantized(weight)))
    squared = (learned(weight).detach() - weight).square().sum()
    assert squared <= (fake_quantize(weight, parse_format(name)) - weight).square().sum() * (1 + 1e-5)


def test_training_the_scales_lowers_the_error():
    weight, format = matrix(16, 64), parse_format("int2-channel")
    learned = GridRounding(clip_search(weight, format), learned=True)
    with torch.no_grad():
        learned.shift += math.log(2)
    before = (learned(weight) - weight).square().sum().item()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (learned(weight) - weight).square().sum().backward()
        optimizer.step()
    best = (dequantize(clip_search(weight, format)) - weight).square().sum().item()
    assert before > 1.5 * best
    assert (learned(weight) - weight).square().sum().item() < 1.1 * best


@pytest.mark.parametrize("name", ["int4-g8-asym", "nvfp4", "q4_1", "mix", "bf16", "q4_k"])
def test_what_is_packed_is_what_was_computed(name):
    weight = matrix(6, 256)
    if name == "mix":
        mix = random_mix(("int2-g32", "int4-g32"), 6, 256)
        first = in_format(method_named("nearest"), weight, mix)
    else:
        first = quantize(weight, parse_format(name))
    learned = GridRounding(first, learned=True)
    with torch.no_grad():
        for shift in learned.parameters():
            shift.add_(0.3 * torch.randn(shift.shape, generator=seeded(3)))
    assert torch.equal(learned(weight).detach(), dequantize(learned.quantized(weight)))
    assert torch.equal(learned(weight).detach(), dequantize(first)) == (name in ("bf16", "q4_k"))
    before = learned(weight).detach()
    assert torch.equal(learned.to(torch.bfloat16)(weight).detach(), before)  # tables and shifts keep their types


def test_gradients_pass_fixed_scales_unchanged():
    weight = matrix().requires_grad_()
    fixed = GridRounding(quantize(weight, parse_format("int2-channel")))
    fixed(weight).backward(matrix(seed=1))
    assert torch.equal(weight.grad, matrix(seed=1))
    assert not list(fixed.parameters())
