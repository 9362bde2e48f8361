"""Every format and scheme that the GPU kernels support, through `linear` with the device's default blocks."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from devices import poisoned
from mpq.core.formats import parse_format
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.gpu.triton.linear import EMULATE, computes, eight_bits, linear
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import dequantize, fake_quantize, quantize

DEVICE = torch.device("cpu" if EMULATE else "cuda")
SIXTEEN = [torch.float16, torch.bfloat16]
INTEGERS = [
    f"int{bits}-{group}{asym}"
    for bits, group, asym in product(range(2, 9), ("g32", "g64", "g128", "channel"), ("", "-asym"))
]
FLOATS = [
    "fp8-e4m3-channel", "fp8-e5m2-channel", "fp8-e4m3", "fp6-e2m3-channel", "fp6-e3m2-channel", "fp4-e2m1-g32", "mxfp4",
    "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2", "nvfp4", "nf4-g64",
    "nl2-g64", "nl3-g64", "nl4-g32", "nl5-channel",
]  # fmt: skip
PROMISED = [*INTEGERS, *FLOATS]


def test_every_promised_format_has_a_kernel() -> None:
    assert len(set(PROMISED)) == 7 * 4 * 2 + len(FLOATS)
    assert all(computes(parse_format(name), dtype) for name in PROMISED for dtype in SIXTEEN)


@pytest.mark.parametrize(
    ("weights", "activation", "dtype"),
    [
        ([name for name in INTEGERS if name.startswith("int4")], "int8-channel", torch.int8),  # w4a8
        ([f"int8-{group}" for group in ("g32", "g64", "g128", "channel")], "int8-channel", torch.int8),  # w8a8
        (["fp8-e4m3-channel", "fp8-e4m3", "mxfp8-e4m3"], "fp8-e4m3-channel", torch.float8_e4m3fn),
    ],
)
def test_promised_schemes_use_8_bit_instructions(weights: list[str], activation: str, dtype: torch.dtype) -> None:
    assert {eight_bits(parse_format(name), parse_format(activation), DEVICE) for name in weights} == {dtype}


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(PROMISED),
    activation=st.sampled_from(["", "", "int8-channel", "fp8-e4m3-channel", "mxfp8-e4m3"]),
    tokens=st.sampled_from([1, 2, 7, 16, 17, 40, 70]),
    rows=st.integers(1, 140),
    cols=st.integers(1, 280),
    dtype=st.sampled_from(SIXTEEN),
    bias=st.booleans(),
)
def test_a_sample_of_them(
    name: str, activation: str, tokens: int, rows: int, cols: int, dtype: torch.dtype, bias: bool
) -> None:
    random = torch.Generator().manual_seed(rows * cols)
    quantized = quantize(torch.randn(rows, cols, generator=random), parse_format(name))
    inputs = torch.randn(tokens, cols, generator=random).to(dtype)
    added = torch.randn(rows, generator=random).to(dtype) if bias else None
    weight = [tensor.to(DEVICE) for tensor in to_layout(pack(quantized), FRAGMENTS).tensors.values()]
    given_bias = None if added is None else added.to(DEVICE)
    with poisoned():
        outputs = [
            linear(inputs.to(DEVICE), weight, given_bias, name, rows, cols, FRAGMENTS, activation).cpu()
            for _ in range(2)
        ]
    rounded = fake_quantize(inputs, parse_format(activation)) if activation else inputs
    matrix = dequantize(quantized).double()
    truth = rounded.double() @ matrix.T + (0 if added is None else added.double())
    # weights and inputs that are not exact in 16 bits, and the output, are each rounded once; the norm of the
    # summands bounds the errors where the sum cancels
    size = rounded.double().norm() * matrix.norm() / max(1, cols) ** 0.5 + truth.norm()
    assert outputs[0].dtype == dtype
    assert float((outputs[0].double() - truth).norm() / size) < 1.5 * torch.finfo(dtype).eps
    assert torch.equal(outputs[0], outputs[1])
