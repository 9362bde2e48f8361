"""The compiled loops of rounding against the PyTorch code that they replace."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.formats import parse_format
from mpq.network.calibration import seeded
from mpq.rounding import compiled
from mpq.rounding.clip_search import clip_search
from mpq.rounding.codes import encode
from mpq.rounding.gptq import gptq, gptq_block
from mpq.rounding.reference import dequantize

NAMES = ("int2-g64", "int3-g10-asym", "int4-channel", "int8", "nf4-g64", "fp4-e2m1-g32", "fp8-e4m3", "fp6-e3m2-channel",
         "mxfp4", "nvfp4", "iq4_nl", "nl2-g64", "nl5-channel", "q4_k", "q4_1")  # fmt: skip
needs_library = pytest.mark.skipif(compiled.library() is None, reason="mpq was installed without a compiler")


@pytest.fixture
def plain(monkeypatch):
    """Switch the compiled loops off."""
    return lambda: monkeypatch.setattr(compiled, "serves", lambda *arguments: False)


def inputs(rows, cols):
    x = torch.randn(3 * cols, cols, generator=seeded("inputs", cols))
    return x.t() @ x / len(x)


@needs_library
@given(
    rows=st.integers(1, 70), width=st.integers(1, 33), name=st.sampled_from(NAMES), seed=st.integers(0, 99),
    offset=st.integers(0, 3),
)  # fmt: skip
def test_blocks_are_rounded_bit_for_bit(rows, width, name, seed, offset):
    grid, generator = parse_format(name).grid, seeded(seed)
    pending = torch.randn(rows, width + 5, generator=generator)
    scales = torch.rand(rows, width + 5, generator=generator)
    scales[0, 0] = 0
    lowest = torch.randn(rows, width + 5, generator=generator) * 0.1
    inverse = torch.randn(width, width, generator=generator).triu() + torch.eye(width)
    results = []
    for function in (compiled.gptq_block, gptq_block):
        mine, codes = pending.clone(), torch.zeros(rows, width + 5, dtype=torch.uint8)
        part = (slice(None), slice(offset, offset + width))
        errors = function(mine[part], scales[part], lowest[part], inverse.t().contiguous().t(), codes[part], grid)
        results.append((mine, codes, errors))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_numbers_half_way_between_two_values_get_the_references_codes(name):
    grid = parse_format(name).grid
    values = torch.tensor(sorted({value for value in grid.values() if np.isfinite(value)}), dtype=torch.float32)
    half_way = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(half_way, torch.full_like(half_way, end)) for end in (-torch.inf, torch.inf)]
    numbers = torch.cat([values, half_way, *beside, torch.tensor([-torch.inf, torch.inf])]).reshape(-1, 1)
    codes, ones = torch.zeros(numbers.shape, dtype=torch.uint8), torch.ones_like(numbers)
    compiled.gptq_block(numbers.clone(), ones, torch.zeros_like(numbers), torch.ones(1, 1), codes, grid)
    assert torch.equal(codes, encode(numbers, grid))


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_clip_search_finds_as_small_an_error(name, plain):
    weight = torch.randn(37, 300, generator=seeded(name)) ** 3
    format = parse_format(name)
    fast = (dequantize(clip_search(weight, format)) - weight).square().sum()
    plain()
    slow = (dequantize(clip_search(weight, format)) - weight).square().sum()
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4)


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_gptq_gives_the_same_codes(name, plain):
    weight = torch.randn(24, 288, generator=seeded(name))
    format, moment = parse_format(name), inputs(24, 288)
    fast = gptq(weight, format, moment)
    plain()
    slow = gptq(weight, format, moment)
    assert (fast.codes == slow.codes).float().mean() > 0.99  # sums in another order may tip a scale


def test_a_changed_moment_is_factorized_again():
    weight, format = torch.randn(8, 64, generator=seeded(0)), parse_format("int3-channel")
    moment = inputs(8, 64)
    first = gptq(weight, format, moment)
    moment.copy_(torch.eye(64))
    changed = gptq(weight, format, moment)
    assert not torch.equal(first.codes, changed.codes)
    assert torch.equal(changed.codes, gptq(weight, format, torch.eye(64)).codes)
