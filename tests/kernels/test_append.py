"""torch.ops.mpq.append: the compiled library equals the reference bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.cache import parse_cache_format
from mpq.core.errors import MpqError
from mpq.kernels import attention
from mpq.kernels.blocks import block_bytes, restore
from mpq.kernels.cpu import attention as compiled_attention
from mpq.kernels.cpu import native as cpu
from mpq.kernels.kv_cache import quantize_heads, round_vectors
from mpq.network.calibration import seeded

COMPILED = (
    "fp32", "fp16", "bf16", "fp8-e4m3", "fp8-e4m3-token", "int8-token", "int8-asym", "int6-asym", "int5-g32",
    "int4-token", "int4-asym", "int4-g32", "int4-g32-asym", "int3-g32", "int3-g16-se4m3", "int2-asym", "int2",
    "int2-g16-se4m3",
)  # fmt: skip
OTHERS = ("mxfp4", "nvfp4", "nf4", "fp8-e5m2", "int4-g32-se8m0")


def slabs(name, width=80, heads=2, sizes=(1, 2)):
    """Slabs filled with old bytes."""
    size = block_bytes(parse_cache_format(name), width)
    return [
        torch.randint(0, 255, (heads, blocks, size), dtype=torch.uint8, generator=seeded(blocks)) for blocks in sizes
    ]


def appended(append, vectors, name, values, positions, sizes=(1, 2)):
    """All tokens' tensors of a cache after appending pieces."""
    held, start = slabs(name, vectors.shape[2], len(vectors), sizes), 0
    for end in positions:
        append(vectors[None, :, start:end], held, name, values, [start])
        start = end
    again = restore(torch.cat(held, 1), parse_cache_format(name), vectors.shape[2], values)
    return [tensor[:, :, :start] for tensor in again.tensors]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", COMPILED + OTHERS)
def test_appended_tokens_equal_the_references(name, values):
    assert attention.APPENDS["cpu"] is compiled_attention.append
    if cpu.native() is not None:
        assert compiled_attention.rounds(compiled_attention.vectors_of(name, 80)) == (name in COMPILED)
    vectors = torch.randn(2, 150, 80, generator=seeded(0, name)) * torch.logspace(-6, 4, 150).unsqueeze(-1)
    vectors[0, 3], vectors[1, 4], vectors[0, 5, 7], vectors[1, 6, 9], vectors[0, 7, 1] = (
        0,
        2.5,
        torch.nan,
        torch.inf,
        1e38,
    )
    expected = quantize_heads(vectors.unsqueeze(0), parse_cache_format(name)).tensors
    for positions in ((150,), (1, 2, 63, 64, 65, 130, 150)):
        same(appended(attention.append_plainly, vectors, name, values, positions), expected)
        same(appended(torch.ops.mpq.append, vectors, name, values, positions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", ["int4-t64-asym", "int3-t64", "int2-t64-asym", "int8-t64"])
def test_blocks_are_rounded_as_they_are_filled(name, values, dtype):
    vectors = torch.randn(2, 300, 20, generator=seeded(0, name)) * torch.logspace(-4, 3, 20)
    vectors[0, 3, 5], vectors[1, 70, 6], vectors[0, 200:, 7], vectors[1, :, 8] = torch.nan, torch.inf, 0, 2.5
    vectors, format, found = vectors.to(dtype), parse_cache_format(name), []
    size = block_bytes(format, 20)
    for append in (attention.append_plainly, torch.ops.mpq.append):
        slabs = [torch.full((2, 64, 20), 9, dtype=dtype), *(torch.zeros(2, n, size, dtype=torch.uint8) for n in (1, 4))]
        start = 0
        for end in (1, 2, 63, 64, 65, 130, 300):
            append(vectors[None, :, start:end], slabs, name, values, [start])
            start = end
        found.append(slabs)
    same(*found)
    numbers = attention.numbers_of(found[1], name, 20, values, 300)
    expected = round_vectors(vectors.unsqueeze(0).float(), format)[0]
    finite = expected.isfinite()
    assert not finite.all()
    assert torch.equal(numbers.isfinite(), finite) or dtype != torch.float32
    torch.testing.assert_close(numbers[:, :256].nan_to_num(), expected[:, :256].nan_to_num(), rtol=0, atol=0)
    filled = vectors.float().clamp(-3e38, 3e38)[:, 256:]
    torch.testing.assert_close(numbers[:, 256:], filled, rtol=0, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(COMPILED), st.booleans(), st.sampled_from([16, 20, 64, 256]), st.floats(-40, 40),
    st.integers(0, 99), st.floats(-3, 3),
)  # fmt: skip
def test_values_of_every_magnitude_are_rounded_alike(name, values, width, exponent, seed, mean):
    vectors = (torch.randn(2, 9, width, generator=seeded(seed)) + mean) * 2.0**exponent
    same(
        appended(torch.ops.mpq.append, vectors, name, values, (9,)),
        quantize_heads(vectors.unsqueeze(0), parse_cache_format(name)).tensors,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_and_16_bit_floats(dtype):
    vectors = torch.randn(70, 2, 80, generator=seeded(1)).to(dtype).transpose(0, 1)
    expected = quantize_heads(vectors.unsqueeze(0), parse_cache_format("int4-g32-asym")).tensors
    same(appended(torch.ops.mpq.append, vectors, "int4-g32-asym", True, (70,)), expected)


@pytest.mark.parametrize("name", ["int8-token", "nf4"])
def test_opcheck(name):
    vectors = torch.randn(2, 70, 80, generator=seeded(1))
    torch.library.opcheck(torch.ops.mpq.append, (vectors.unsqueeze(0), slabs(name), name, False, [3]))


@pytest.mark.parametrize(("vectors", "position", "message"), [
    (torch.ones(2, 3, 80), 190, "add a slab"),
    (torch.ones(2, 3, 80), -1, "add a slab"),
    (torch.ones(3, 3, 80), 0, "as many heads"),
    (torch.ones(2, 3, 64), 0, "invalid shape of slabs"),
    (torch.ones(2, 3, 80, dtype=torch.int32), 0, "type int32"),
])  # fmt: skip
def test_invalid_calls_are_refused_by_name(vectors, position, message):
    with pytest.raises(MpqError, match=message):
        torch.ops.mpq.append(vectors.unsqueeze(0), slabs("int8-token"), "int8-token", False, [position])


def test_invalid_sequences_are_refused_by_name():
    for positions, count in (([1], 4), ([1, 2, 3], 6), ([1, 2], 3)):
        with pytest.raises(MpqError, match="the same number of slabs for each"):
            torch.ops.mpq.append(torch.ones(2, 2, 1, 80), (slabs("fp16") * 3)[:count], "fp16", False, positions)


@pytest.mark.parametrize("name", ["int8-token", "int3-t64-asym", "nf4"])
def test_several_sequences_equal_single_ones(name):
    vectors, positions, size = (
        torch.randn(3, 2, 2, 20, generator=seeded(5)),
        [62, 0, 70],
        block_bytes(parse_cache_format(name), 20),
    )
    held = [[torch.zeros(2, 64, 20)] if "-t64" in name else [] for _ in range(6)]
    held = [[*one, *(torch.zeros(2, n, size, dtype=torch.uint8) for n in (1, 1))] for one in held]
    torch.ops.mpq.append(vectors, [slab for own in held[:3] for slab in own], name, False, positions)
    for own, position, one in zip(held[3:], positions, vectors, strict=True):
        torch.ops.mpq.append(one.unsqueeze(0), own, name, False, [position])
    same([slab for own in held[:3] for slab in own], [slab for own in held[3:] for slab in own])
