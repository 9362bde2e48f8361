"""torch.ops.mpq.attend at every level of the CPU kernels against the plain reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.cache import TokenBlocks, parse_cache_format
from mpq.core.errors import MpqError
from mpq.kernels import attention
from mpq.kernels.blocks import TOKENS, arrange, packed_blocks
from mpq.kernels.cpu import attention as compiled_attention
from mpq.kernels.cpu import native as cpu
from mpq.kernels.kv_cache import attention as plain_attention
from mpq.kernels.kv_cache import quantize_heads
from mpq.network.calibration import seeded

FORMATS = (
    "fp32", "fp16", "bf16", "fp8-e4m3", "fp8-e4m3-token", "int8-token", "int8-asym", "int6-asym", "int4-token",
    "int4-asym", "int4-g32", "int4-g32-asym", "int3-g32", "int2-asym", "mxfp4", "nvfp4", "nf4", "fp8-e5m2",
    "int4-t64-asym", "int3-t64-asym", "int2-t64", "int8-t64-asym",
)  # fmt: skip
# Probabilities times scales, and queries, are rounded to 1/32639 of the largest of a block or a head: half such a step
# in each column of a score (which multiplies its exponential) and in each of a block's values.
CLOSE = 3e-4
compiled = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")


@pytest.fixture(params=cpu.levels(), ids=lambda i: cpu.LEVELS[i])
def level(request, monkeypatch):
    found = replace(cpu.native(), level=request.param)
    monkeypatch.setattr(cpu, "native", lambda: found)


def slabs_of(vectors, name, values, length=0, first=1):
    """A cache (key heads, tokens, width) in slabs: the first has `first` blocks, the next has the rest.

    With blocks of tokens, the tokens after the last full block are stored before the others.
    """
    format = parse_cache_format(name)
    blocks = packed_blocks(vectors, format, values)
    slabs = [part.contiguous() for part in (blocks[:, :first], blocks[:, first:]) if part.shape[1]]
    if not isinstance(format, TokenBlocks):
        return slabs
    filled = length - length % TOKENS
    newest = torch.full((len(vectors), TOKENS, vectors.shape[2]), torch.nan)
    newest[:, : length - filled] = vectors[:, filled:length]
    for slab in slabs:
        if 0 <= filled // TOKENS < slab.shape[1]:
            slab[:, filled // TOKENS :] = 255
        filled -= slab.shape[1] * TOKENS
    return [newest, *slabs]


def call(key_format="int8-token", value_format="int8-token", *, lengths=(100,), heads=4, key_heads=2, width=64, seed=0,
         query_format="", window=0, sinks=False, change=lambda k, v: None):  # fmt: skip
    """Arguments of `attend` for random queries and caches."""

    def random(name, *shape):
        return torch.randn(shape, generator=seeded(seed, name, *shape))

    keys, values = [], []
    for place, length in enumerate(lengths):
        mean = random("mean", key_heads, 1, width)
        k, v = random("k", key_heads, length, width) + mean + place, random("v", key_heads, length, width) + mean
        change(k, v)
        blocks = -(-max(lengths) // TOKENS)
        full = [torch.nn.functional.pad(x, (0, 0, 0, blocks * TOKENS - length)) for x in (k, v)]
        keys += slabs_of(full[0], key_format, False, length)
        values += slabs_of(full[1], value_format, True, length)
    query = random("q", len(lengths), heads, width) * 2
    return (query, keys, values, list(lengths), key_format, value_format, query_format, width**-0.5, window,
            random("sinks", heads) if sinks else None)  # fmt: skip


def check(arguments):
    assert attention.KERNELS["cpu"] is compiled_attention.attend
    expected, found = attention.attend_plainly(*arguments), torch.ops.mpq.attend(*arguments)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found, expected, rtol=0, atol=CLOSE * float(expected.nan_to_num().abs().max()), equal_nan=True
    )


@compiled
@pytest.mark.parametrize("value_format", FORMATS)
@pytest.mark.parametrize("key_format", FORMATS)
def test_every_pair_of_formats(key_format, value_format):
    check(call(key_format, value_format))


@compiled
@pytest.mark.parametrize("formats", [("int8-token", "int4-g32-asym"), ("int4-asym", "mxfp4"), ("bf16", "fp8-e4m3"),
                                     ("int3-g32", "fp16"), ("fp8-e4m3-token", "nvfp4"), ("int4-t64-asym", "int3-t64"),
                                     ("int8-t64-asym", "int8-asym")])  # fmt: skip
@pytest.mark.parametrize("width", [16, 20, 64, 80, 96, 128, 256])
def test_widths_at_every_level(formats, width, level):
    check(call(*formats, width=width, lengths=(70, 129)))


@compiled
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.integers(1, 9), st.integers(1, 3), st.sampled_from([16, 40, 64, 80, 96, 128, 256]),
    st.sampled_from(["", "int8-channel"]),
    st.sampled_from([0, 1, 63, 64, 130]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_any_call(key_format, value_format, lengths, group, key_heads, width, query_format, window, sinks, seed):
    check(call(key_format, value_format, lengths=tuple(lengths), heads=group * key_heads, key_heads=key_heads,
               width=width, query_format=query_format, window=window, sinks=sinks, seed=seed))  # fmt: skip


def test_the_reference_is_the_plain_attention():
    arguments = call("int4-g32-asym", "fp8-e4m3", lengths=(100,))
    query, keys, values = arguments[:3]
    k, v = (attention.numbers_of(slabs, name, 64, which, 100) for slabs, name, which in
            ((keys, "int4-g32-asym", False), (values, "fp8-e4m3", True)))  # fmt: skip
    expected = plain_attention(query.reshape(1, 4, 1, 64), k.unsqueeze(0), v.unsqueeze(0))
    torch.testing.assert_close(attention.attend_plainly(*arguments), expected.reshape(1, 4, 64))


def test_windows_and_sinks_match_a_masked_softmax():
    arguments = call("fp32", "fp32", window=10, sinks=True)
    query, keys, values, _, *_, sinks = arguments
    k, v = (
        attention.numbers_of(part, "fp32", 64, False, 100)[:, 90:].repeat_interleave(2, 0) for part in (keys, values)
    )
    weights = torch.cat([k @ query[0, :, :, None] / 8, sinks.reshape(4, 1, 1)], 1).softmax(1)[:, :10]
    torch.testing.assert_close(attention.attend_plainly(*arguments)[0], (weights * v).sum(1))


@compiled
@pytest.mark.parametrize(
    "formats",
    [
        ("int8-asym", "int4-g32"),
        ("mxfp4", "nvfp4"),
        ("fp16", "bf16"),
        ("fp8-e4m3", "fp32"),
        ("int3-t64-asym", "int4-t64-asym"),
    ],
)
@pytest.mark.parametrize("where", ["keys", "values"])
def test_nan_reaches_the_heads_that_see_it(formats, where, level):
    def change(k, v):
        (k if where == "keys" else v)[1, 77, 3] = torch.nan

    for window in (0, 20):  # a window of the newest 20 of 100 tokens does not contain it
        arguments = call(*formats, change=change, window=window)
        check(arguments)
        found = torch.ops.mpq.attend(*arguments)
        assert not found[:, :2].isnan().any()
        assert found[:, 2:].isnan().any() == (window == 0)


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key_format", ["int8-token", "bf16"])
def test_queries_with_nan_give_nan(value, key_format):
    arguments = call(key_format)
    arguments[0][0, 1, 5] = value
    found = torch.ops.mpq.attend(*arguments)
    assert found[0, 1].isnan().all()
    assert found[0, [0, 2, 3]].isfinite().all()


@compiled
def test_scores_far_apart_neither_overflow_nor_vanish(level):
    arguments = call("fp32", "int8-token", lengths=(300,), seed=3)
    check((arguments[0] * 1e4, *arguments[1:]))
    check((arguments[0] * 1e-20, *arguments[1:]))
    check((arguments[0] * 0, *arguments[1:]))


@compiled
@pytest.mark.parametrize("formats", [("int8-token", "int4-g32"), ("fp16", "bf16"), ("int3-t64-asym", "int4-t64")])
def test_the_same_bits_for_any_number_of_threads(formats, level):
    arguments, before, found = call(*formats, lengths=(1500, 3, 700), heads=6), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.ops.mpq.attend(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@compiled
def test_a_sequence_s_result_does_not_depend_on_its_neighbours():
    both, alone = call(lengths=(500, 90)), call(lengths=(500,))
    half = len(both[1]) // 2
    one = (both[0][:1], both[1][:half], both[2][:half], [500], *both[4:])
    assert torch.equal(torch.ops.mpq.attend(*both)[:1], torch.ops.mpq.attend(*one))
    assert alone[3] == one[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", [("int8-token", "int4-g32"), ("fp16", "nf4")])
def test_opcheck(formats, dtype):
    query, *rest = call(*formats, lengths=(70, 65), sinks=True)
    torch.library.opcheck(torch.ops.mpq.attend, (query.to(dtype), *rest))


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: (a[0][0], *a[1:]), "one each"),
    (lambda a: (a[0].int(), *a[1:]), "type int32"),
    (lambda a: (*a[:3], [129], *a[4:]), "expected 1 to 128"),
    (lambda a: (*a[:3], [0], *a[4:]), "expected 1 to 128"),
    (lambda a: (*a[:4], "int4-token", *a[5:]), "invalid shape of slabs"),
    (lambda a: (*a[:4], "int4-g20", *a[5:]), "not multiples of 16"),
    (lambda a: (a[0][:, :3], *a[1:]), "3 heads"),
])  # fmt: skip
def test_invalid_calls_are_refused_by_name(change, message):
    with pytest.raises(MpqError, match=message):
        torch.ops.mpq.attend(*change(call()))


@compiled
def test_every_code_of_fp8(level):
    """A single token has a softmax weight of 1: its values are returned exactly, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256)
    heads = quantize_heads(torch.zeros(1, 1, 1, 256), parse_cache_format("fp8-e4m3")).with_tensors([codes])
    keys = slabs_of(torch.zeros(1, 1, 256), "fp32", False)
    values, query = [arrange(heads, True)], torch.ones(1, 1, 256)
    found = torch.ops.mpq.attend(query, keys, values, [1], "fp32", "fp8-e4m3", "", 1.0, 0, None)
    expected = codes.view(torch.float8_e4m3fn).float().reshape(1, 1, 256)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert int(found.isnan().sum()) == 2
