import ctypes
import os
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.kernels import reference
from mpq.kernels.cpu import dispatch, panels
from mpq.kernels.cpu import native as cpu
from mpq.kernels.layout import LAYOUTS, best_layout, pack, to_layout, unpack
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize, quantize

EXTRA = (
    "int4-g10", "int5-g100", "int7-g128", "int4-g512", "int4-channel-asym", "int4-g32-sbf16", "uint4-g32",
    "fp7-e3m3-g64", "fp8-e3m4-g16", "fp8-e4m3-g10", "fp4-e2m1-g16-sue5m3", "fp5-e2m2-g100",
)  # fmt: skip
NAMES = tuple(name for name in (*FORMATS, *EXTRA) if panels.supports(parse_format(name)))
GRIDS = (
    "fp4-e2m1", "fp6-e2m3", "fp6-e3m2", "fp8-e4m3", "fp8-e5m2", "nf4", "nl2", "nl3", "nl4", "nl5",
    *(f"int{bits}" for bits in range(2, 9)),
)  # fmt: skip
GROUPS = ("g16", "g32", "g64", "g128", "channel")
EVERY = (
    *NAMES,
    *(f"{grid}-{group}" for grid in GRIDS for group in GROUPS),
    *(f"{grid}-{group}-asym" for grid in GRIDS if grid.startswith("int") for group in GROUPS),
)

needs_native = pytest.mark.skipif(
    cpu.native() is None, reason="the kernels are not compiled here: pip install -e . with a C compiler"
)


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Fill PyTorch's uninitialized memory with NaN and the largest integers: none may remain in results."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=list(cpu.levels()), ids=lambda level: cpu.LEVELS[level])
def level(request, monkeypatch):
    found = cpu.native()
    capped = cpu.Native(found.library, request.param, found.parallel)
    monkeypatch.setattr(cpu, "native", lambda: capped)
    dispatch.serve(capped.library, capped.level, capped.parallel)
    yield request.param
    dispatch.serve(found.library, found.level, found.parallel)


@lru_cache(maxsize=256)
def weight_of(name, rows, cols):
    packed = pack(quantize(torch.randn((rows, cols), generator=seeded(0, name, rows, cols)), parse_format(name)))
    return packed, to_layout(packed, panels.NAME)


def linear(x, packed, bias=None, activation=""):
    """The op's product; also computed through Python, where poisoned memory exposes unwritten elements."""
    call = (x, list(packed.tensors.values()), bias, packed.format.name, *packed.shape, packed.layout, activation)
    found, other = torch.ops.mpq.linear(*call), torch.ops.mpq.linear_any(*call)
    assert torch.equal(found.nan_to_num(), other.nan_to_num())
    return other


def bound(x, packed, dtype=torch.float32):
    """Bound on a kernel's error against exact products of the same values, (tokens, rows).

    Activations: half a step of 1/32639 of the largest magnitude (bfloat16 in two planes: 2**-17 of each). Codebooks:
    half a step of 1/32639 of the grid's largest value. Levels of 16 bits: without the low bytes' product with those of
    activations, both at most 128 such steps. Float32: each of the tiles' sums and its four operations rounds
    once, relative to the sum of magnitudes with the offset in. Bfloat16 activations of eight tokens or more may
    meet weights rounded likewise.
    """
    by_weight = 2**-8 if dtype == torch.bfloat16 and len(x) >= 8 else 0
    matrix, x = dequantize(unpack(packed)).double().abs(), x.double().abs()
    largest = x.amax(-1, keepdim=True)
    scale = matrix.amax(-1)
    tiles = -(-packed.shape[1] // 64) + 8
    by_x = largest * matrix.sum(-1) / 65278
    by_codebook = x.sum(-1, keepdim=True) * scale / 65278
    if panels.levels_of(packed.format.grid).kind == panels.TABLE16:
        by_codebook = by_codebook + packed.shape[1] * (128 / 32639) ** 2 * largest * scale
    by_sums = (tiles * 2**-24) * 8 * (x.sum(-1, keepdim=True) * scale)
    return by_x + by_codebook + by_sums + by_weight * (x @ matrix.T) + 1e-30


TYPES = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@needs_native
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(EVERY), st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 40, 64, 257]), st.integers(1, 150),
    st.integers(1, 400), st.sampled_from(sorted(TYPES, key=str)), st.booleans(), st.sampled_from(["", "int8-channel"]),
    st.integers(0, 9),
)  # fmt: skip
@example("mxfp8-e4m3", 300, 65, 129, torch.float32, True, "", 0)
@example("fp6-e3m2-channel", 12, 64, 384, torch.float32, False, "", 1)
@example("int5-g64-asym", 4, 70, 257, torch.float32, True, "", 2)
@example("nvfp4", 4, 70, 257, torch.float32, True, "", 2)
@example("nf4-g64", 2, 70, 257, torch.float32, True, "", 2)
@example("nf4-g64", 40, 70, 257, torch.bfloat16, True, "", 1)
@example("nf4-g64", 33, 70, 257, torch.float32, True, "", 1)
@example("int4-g32", 16, 70, 257, torch.float32, True, "", 1)
@example("int4-g32-asym", 33, 70, 257, torch.float32, True, "int8-channel", 1)
@example("mxfp4", 9, 70, 257, torch.bfloat16, True, "", 1)
def test_equals_the_reference(level, name, tokens, rows, cols, dtype, with_bias, activation, seed):
    packed, arranged = weight_of(name, rows, cols)
    random = seeded(seed, tokens, cols)
    x = torch.randn((tokens, cols + 3), generator=random).to(dtype)[:, :cols]  # strided
    bias = torch.randn(rows, generator=random).to(dtype) if with_bias else None
    found = linear(x, arranged, bias, activation)
    if activation:
        x = reference.quantize_activation(x.float(), activation)
    exact = x.double() @ dequantize(unpack(packed)).double().T
    if bias is not None:
        exact = exact + bias.double()
    assert found.dtype == dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    allowed = bound(x, packed, dtype) + TYPES[dtype] * exact.abs() + 2**-22 * exact.abs()
    allowed += 2**-24 if dtype == torch.float16 else 0  # its subnormals
    if (
        activation and panels.levels_of(packed.format.grid).kind == panels.TABLE_BF16
    ):  # rounded before the call, to the type
        allowed += TYPES[dtype] * (x.double().abs() @ dequantize(unpack(packed)).double().abs().T)
    assert (error <= allowed).all(), (error / allowed).max()


@needs_native
@pytest.mark.parametrize(
    "name", [name for name in NAMES if panels.levels_of(parse_format(name).grid).kind != panels.TABLE_BF16]
)
@pytest.mark.parametrize("tokens", [1, 3, 4, 20, 40])
def test_int8_activations_are_the_reference_arithmetic(level, name, tokens):
    packed, arranged = weight_of(name, 70, 300)
    x = torch.randn((tokens, 300), generator=seeded(tokens))
    error = (linear(x, arranged, activation="int8-channel") - linear(x, packed, activation="int8-channel")).abs()
    largest = dequantize(unpack(packed)).abs().amax(-1) * x.abs().sum(-1, keepdim=True)
    codebook = 1 / 65534 if parse_format(name).grid.family == "codebook" else 0
    assert (error <= largest * (2**-20 + codebook)).all()  # float32 sums in another order


@needs_native
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 150), st.integers(1, 700))
def test_panels_are_lossless(name, rows, cols):
    packed, arranged = weight_of(name, rows, cols)
    assert list(arranged.tensors) == list(LAYOUTS[panels.NAME].names(packed.format))
    restored = to_layout(arranged, "rows")
    assert list(restored.tensors) == list(packed.tensors)
    for key, tensor in packed.tensors.items():
        assert torch.equal(restored.tensors[key], tensor), key
        assert restored.tensors[key].dtype == tensor.dtype


@needs_native
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 150), st.integers(1, 700))
def test_panels_are_unpacked_exactly(name, rows, cols):
    packed, arranged = weight_of(name, rows, cols)
    facts = (packed.format.name, *packed.shape)
    found = torch.ops.mpq.dequantize(list(arranged.tensors.values()), *facts, panels.NAME)
    assert torch.equal(found, torch.ops.mpq.dequantize(list(packed.tensors.values()), *facts, "rows"))


@needs_native
@pytest.mark.parametrize(
    "name",
    ["int4-g128", "int3-g64-asym", "int5-g100", "int8-channel-asym", "fp8-e4m3", "mxfp6-e2m3", "nf4-g64", "nvfp4"],
)
@pytest.mark.parametrize("tokens", [1, 7, 70, 300])
@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, ""), (torch.bfloat16, ""), (torch.float32, "int8-channel")]
)
def test_same_bits_for_any_number_of_threads_and_every_element_written(level, name, tokens, dtype, activation):
    _, arranged = weight_of(name, 200, 300)
    x = torch.randn((tokens, 300), generator=seeded(tokens)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found.append(linear(x, arranged, activation=activation))
    finally:
        torch.set_num_threads(before)
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_native
@pytest.mark.parametrize("name", ["int4-g128", "int8-g16-asym", "fp8-e4m3", "mxfp4", "fp6-e3m2-channel"])
@pytest.mark.parametrize(("tokens", "activation"), [
    *((tokens, "") for tokens in (1, 6, 40, 100)), *((tokens, "int8-channel") for tokens in (1, 3, 20)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", sorted(TYPES, key=str))
def test_nan_infinities_and_vanishing_numbers_pass_through(level, name, tokens, activation, dtype):
    packed, arranged = weight_of(name, 70, 300)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-45, 1e-38, 3e38, -3e38, -1e12):
        x = torch.randn((tokens, 300), generator=seeded(tokens)).to(dtype)
        x[0, 150] = value
        if abs(value) < 1:  # a token of denormals only, where the type has them
            x[0] = value
        expected, found = linear(x, packed, None, activation), linear(x, arranged, None, activation)
        assert torch.equal(torch.isnan(expected), torch.isnan(found))
        assert torch.equal(torch.isinf(expected), torch.isinf(found))
        good = torch.isfinite(expected)
        if activation:  # a token has one scale, which is NaN if one of its numbers is not finite
            assert torch.equal(good.all(-1), x.isfinite().all(-1))
            x = reference.quantize_activation(x, activation)
        # Tokens without an integer form are the reference's; the others are within the usual bound plus the reference's
        # own rounding: each of 300 sums in float32, relative to the sum of magnitudes, and to the dtype.
        finite = x.float().nan_to_num(0, 3e38, 3e38)
        magnitudes = finite.double().abs() @ dequantize(unpack(packed)).double().abs().T
        allowed = bound(finite, packed, dtype) + 300 * 2**-24 * magnitudes + 2 * TYPES[dtype] * expected.double().abs()
        allowed += 2**-24 if dtype == torch.float16 else 0  # its subnormals
        if activation:  # the reference rounds its dequantized activations to their dtype
            allowed += TYPES[dtype] * magnitudes
        assert ((found.double() - expected.double()).abs()[good] <= allowed[good]).all()


@needs_native
@pytest.mark.parametrize(
    "name", ["fp8-e4m3-channel", "fp8-e5m2-channel", "mxfp8-e4m3", "fp8-e3m4-g16", "fp8-e2m5-g100"]
)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_every_code_of_an_8_bit_float_is_its_value(level, name, tokens):
    """Inputs of a single one pick columns: small numbers, zeros and both signs, exactly."""
    packed = pack(quantize(torch.randn((70, 300), generator=seeded(0)), parse_format(name)))
    finite = torch.arange(256)[torch.from_numpy(np.isfinite(packed.format.grid.values()))]
    codes = finite[torch.randint(len(finite), packed.tensors["packed"].shape, generator=seeded(1))]
    packed.tensors["packed"] = codes.to(torch.uint8)
    values, arranged = dequantize(unpack(packed)), to_layout(packed, panels.NAME)
    for column in range(0, 300, tokens * 7):
        x = torch.zeros((tokens, 300))
        picked = torch.arange(column, column + tokens) % 300
        x[torch.arange(tokens), picked] = 1
        assert torch.equal(linear(x, arranged), values[:, picked].T)


@needs_native
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6-e2m3"])
def test_powers_of_two_near_the_ends_of_their_range(level, name):
    scales = 2.0 ** torch.linspace(-120, 110, 128)[:, None]
    packed = pack(quantize(torch.randn((128, 256), generator=seeded(0)) * scales, parse_format(name)))
    x = torch.randn((20, 256), generator=seeded(1))
    exact = x.double() @ dequantize(unpack(packed)).double().T
    error = (linear(x, to_layout(packed, panels.NAME)).double() - exact).abs()
    assert (error <= bound(x, packed) + 2**-22 * exact.abs()).all()


@needs_native
@pytest.mark.parametrize("activation", ["", "int8-channel"])
def test_zero_tokens_and_leading_dimensions(level, activation):
    for name in ("int4-g128", "fp8-e4m3", "int3-g64-asym"):
        _, arranged = weight_of(name, 70, 300)
        for dtype in TYPES:
            empty = linear(torch.empty(0, 300, dtype=dtype), arranged, activation=activation)
            assert empty.shape == (0, 70)
            assert empty.dtype == dtype
        assert linear(torch.empty(2, 0, 300), arranged, activation=activation).shape == (2, 0, 70)
        x = torch.randn(2, 3, 300)
        flat = linear(x.reshape(6, 300), arranged, activation=activation)
        assert torch.equal(linear(x, arranged, activation=activation).reshape(6, 70), flat)


@needs_native
def test_cpu_weights_are_stored_in_panels():
    packed, _ = weight_of("int4-g128", 70, 300)
    assert best_layout(packed, torch.device("cpu")) == panels.NAME
    assert best_layout(pack(quantize(torch.ones(3, 3), parse_format("bf16"))), torch.device("cpu")) == "rows"
    nan = pack(quantize(torch.ones(3, 32), parse_format("mxfp4")))
    nan.tensors["scale"][0] = 255
    assert best_layout(nan, torch.device("cpu")) == "rows"
    for name, code in (("fp8-e4m3-channel", 0x7F), ("fp8-e4m3-channel", 0xFF), ("fp8-e5m2-channel", 0x7C)):
        infinite = pack(quantize(torch.ones(3, 32), parse_format(name)))
        assert best_layout(infinite, torch.device("cpu")) == panels.NAME
        infinite.tensors["packed"].view(torch.uint8)[1, 5] = code
        assert best_layout(infinite, torch.device("cpu")) == "rows"


@needs_native
def test_the_environment_caps_the_level():
    script = "from mpq.kernels.cpu import native; print(native.level_name())"
    for name in [cpu.LEVELS[level] for level in cpu.levels()]:
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "MPQ_CPU_LEVEL": name}
        )
        assert found.stdout.strip() == name, found.stderr


@needs_native
def test_levels_are_named_as_the_library_orders_them():
    name = cpu.native().library.mpq_level_name
    name.restype = ctypes.c_char_p
    assert tuple(name(level).decode() for level in range(len(cpu.LEVELS))) == cpu.LEVELS


@needs_native
def test_an_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv("MPQ_CPU_LEVEL", "sse9")
    with pytest.raises(MpqError, match="sse9"):
        cpu.native.__wrapped__()


@needs_native
@pytest.mark.parametrize("name", ["int4-g128", "int8", "nvfp4", "int3-channel-asym"])
def test_embeddings_unpack_the_panels_they_need(name):
    packed, arranged = weight_of(name, 300, 70)
    indices = torch.tensor([[299, 0, 64], [63, 64, 130]])
    facts = (packed.format.name, *packed.shape)
    found, expected = (
        torch.ops.mpq.embedding(indices, list(one.tensors.values()), *facts, one.layout, torch.float32)
        for one in (arranged, packed)
    )
    assert torch.equal(found, expected)


def test_formats_without_a_kernel_warn_once_and_compute(caplog):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    packed = pack(quantize(weight, parse_format("q4_k")))
    cpu._say_uncompiled.cache_clear()
    for _ in range(2):
        assert best_layout(packed, torch.device("cpu")) == "rows"
    assert [record.message.split(" run")[0] for record in caplog.records] == [
        "layers in q4_k have no compiled kernel and"
    ]
