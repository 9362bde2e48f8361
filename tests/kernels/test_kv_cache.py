"""The low-bit cache of keys and values against float64 attention."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq.core.cache import CACHE_FORMATS, head_bytes, parse_cache_format
from mpq.core.costs import kv_bytes_per_token
from mpq.core.errors import MpqError
from mpq.kernels.kv_cache import Heads, attention, concatenate, dequantize_heads, quantize_heads, round_vectors
from mpq.kernels.layout import unpack_bits


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(bits=st.integers(1, 8), width=st.integers(1, 20), seed=st.integers(0, 99), spread=st.floats(1e-3, 1e3))
def test_every_element_is_within_half_a_step(bits: int, width: int, seed: int, spread: float) -> None:
    values = vectors(2, 3, 4, width, seed=seed) * spread
    heads = quantize_heads(values, bits)
    error = (dequantize_heads(heads) - values).abs()
    assert heads.scale is not None
    assert heads.zero is not None
    step = heads.scale.float()
    # half a step; the float16 zero and the float16 scale, over all steps, may each be off by half a last place
    # (2**-25 where a float16 is subnormal), and float32 arithmetic
    zero, steps = heads.zero.float().abs(), 2**bits - 1
    slack = (2.0**-11 * zero).clamp(min=2.0**-25) + (2.0**-11 * step).clamp(min=2.0**-25) * steps
    slack = slack + 2.0**-21 * values.abs().amax()
    assert bool((error <= step / 2 + slack).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scales_are_the_nearest_float16_and_codes_are_nearest_by_the_stored_scale(bits: int) -> None:
    values = vectors(4, 5, 50, 24, seed=bits) * torch.logspace(-2, 2, 50).unsqueeze(-1)
    heads, exact = quantize_heads(values, bits), values.double().numpy()
    assert heads.scale is not None
    assert heads.zero is not None
    assert heads.scale.dtype == heads.zero.dtype == torch.float16
    zero = exact.min(-1).astype(np.float16)
    assert np.array_equal(heads.zero[..., 0].numpy(), zero)
    ideal = (exact.max(-1) - exact.min(-1)) / (2**bits - 1)
    stored = heads.scale[..., 0].numpy()
    scale = stored.astype(np.float64)
    last_place = np.spacing(stored).astype(np.float64)
    assert (np.abs(scale - ideal) <= last_place * 0.5001).all()
    codes = unpack_bits(heads.codes.flatten(0, 2), bits, 24).reshape(values.shape).double().numpy()
    steps = (exact - zero.astype(np.float64)[..., None]) / scale[..., None]
    expected = np.clip(np.round(steps), 0, 2**bits - 1)
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
    assert (codes == expected)[~tie].all()


def test_constant_vectors_are_kept() -> None:
    values = torch.full((1, 1, 2, 8), 0.75)
    assert torch.equal(dequantize_heads(quantize_heads(values, 2)), values)


def test_tokens_arrive_one_by_one() -> None:
    values = vectors(2, 3, 5, 16)
    whole = quantize_heads(values, 4)
    joined = concatenate([quantize_heads(part, 4) for part in values.split(1, 2)])
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(dequantize_heads(joined), dequantize_heads(whole))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_match_the_cost_model(bits: int) -> None:
    heads = quantize_heads(vectors(1, 4, 10, 32), bits)
    assert 2 * heads.nbytes == 10 * kv_bytes_per_token(1, 4, 32, bits)


def slow(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    output = torch.zeros(query.shape, dtype=torch.float64)
    shared = query.shape[1] // keys.shape[1]
    for batch, head, token in itertools.product(*(range(size) for size in query.shape[:3])):
        seen = keys.shape[2] - query.shape[2] + token + 1
        scores = keys[batch, head // shared, :seen].double() @ query[batch, head, token].double()
        weights = torch.softmax(scores / query.shape[-1] ** 0.5, 0)
        output[batch, head, token] = weights @ values[batch, head // shared, :seen].double()
    return output


def in_precision(values: Tensor, precision: str) -> tuple[Tensor | Heads, Tensor]:
    if precision.startswith("int"):
        heads = quantize_heads(values, int(precision[3:]))
        return heads, dequantize_heads(heads)
    copy = values.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    return copy, copy.float()


@pytest.mark.parametrize("precisions", list(itertools.product(["fp32", "bf16", "int8", "int4"], repeat=3)))
def test_attention_over_every_mix_of_precisions(precisions: tuple[str, str, str]) -> None:
    shapes = [(2, 4, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16)]
    pairs = [
        in_precision(vectors(*shape, seed=place), precision)
        for place, (shape, precision) in enumerate(zip(shapes, precisions, strict=True))
    ]
    output = attention(*(pair[0] for pair in pairs))
    torch.testing.assert_close(output.double(), slow(*(pair[1] for pair in pairs)), rtol=1e-5, atol=1e-5)


def test_more_bits_never_hurt() -> None:
    query, keys, values = (vectors(4, 8, 64, 32, seed=place) for place in range(3))
    truth = attention(query, keys, values)
    errors = [
        float((attention(query, quantize_heads(keys, bits), quantize_heads(values, bits)) - truth).norm())
        for bits in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)


NAMES = (
    *(name for name in CACHE_FORMATS if "-t64" not in name), "bf16", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-token", "mxfp4",
    "mxfp8-e4m3", "nvfp4", "int2", "int3", "int5-g16", "nf4-g32", "int4-g24-asym",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [64, 80])
def test_every_format_is_stored_in_the_bytes_it_says_and_read_back(name: str, width: int) -> None:
    format = parse_cache_format(name)
    values = vectors(2, 3, 5, width)
    heads = quantize_heads(values, format)
    assert heads.nbytes == 2 * 3 * 5 * head_bytes(format, width)
    assert torch.equal(round_vectors(values, format), dequantize_heads(heads))
    error = (dequantize_heads(heads) - values).norm() / values.norm()
    assert error < {2: 0.8, 3: 0.4, 4: 0.2}.get(format.grid.bits, 0.1)
    again = dequantize_heads(quantize_heads(dequantize_heads(heads)[:, :, 1:3], format))
    assert (again - dequantize_heads(heads)[:, :, 1:3]).abs().max() < 0.05
    one_by_one = concatenate([quantize_heads(part, format) for part in values.split(1, 2)])
    assert torch.equal(dequantize_heads(one_by_one), dequantize_heads(heads))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fp16", "bf16")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_affects_only_its_own_group(name: str, bad: float) -> None:
    values = vectors(1, 2, 3, 64)
    spoilt = values.clone()
    spoilt[0, 1, 2, 3] = bad
    format = parse_cache_format(name)
    read, clean = (dequantize_heads(quantize_heads(part, format)) for part in (spoilt, values))
    assert read[0, 1, 2, 3].isnan()
    assert torch.equal(read[:, :1], clean[:, :1])
    assert torch.equal(read[:, :, :2], clean[:, :, :2])


def test_casts_match_the_processors() -> None:
    values = vectors(1, 2, 3, 64) * 50
    expected = values.to(torch.float8_e4m3fn)
    heads = quantize_heads(values, parse_cache_format("fp8-e4m3"))
    assert torch.equal(heads.codes, expected.view(torch.uint8))
    assert torch.equal(dequantize_heads(heads), expected.float())


def test_invalid_arguments_are_refused_by_name() -> None:
    with pytest.raises(MpqError, match="1 to 8 bits"):
        quantize_heads(vectors(1, 1, 1, 4), 9)
    with pytest.raises(MpqError, match="do not divide"):
        attention(vectors(1, 3, 2, 4), vectors(1, 2, 2, 4), vectors(1, 2, 2, 4))
    with pytest.raises(MpqError, match="different formats"):
        concatenate([quantize_heads(vectors(1, 1, 1, 4), 4), quantize_heads(vectors(1, 1, 1, 4), 8)])
