"""Products of inputs and weights that are both low-bit, against float64 from the rounded numbers."""

import pytest
import torch

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from mpq.core.formats import parse_format
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.gpu.triton.config import Config
from mpq.kernels.gpu.triton.linear import EMULATE, eight_bit_inputs, eight_bits, linear, product, rounded_inputs
from mpq.kernels.layout import pack, to_layout
from mpq.kernels.reference import quantize_activation
from mpq.rounding.reference import dequantize, fake_quantize, quantize

DEVICE = torch.device("cpu" if EMULATE else "cuda")
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("weight_name", "activation_name", "expected"),
    [
        ("int4-g128", "int8-channel", INT8), ("int8-channel", "int8-channel", INT8), ("int8", "int8", INT8),
        ("int3-g32-asym", "int8-channel", INT8), ("int7-channel-asym", "int4-channel", INT8),
        ("int6-channel", "int8-channel-sbf16", INT8), ("int4-g64", "int8-channel-sfp32", INT8),
        ("fp8-e4m3-channel", "fp8-e4m3-channel", E4M3), ("fp8-e4m3", "fp8-e4m3", E4M3),
        ("mxfp8-e4m3", "fp8-e4m3-channel", E4M3),
        ("int8-g128-asym", "int8-channel", None), ("nvfp4", "int8-channel", None), ("int4-g128", "mxfp8-e4m3", None),
        ("int4-g16", "int8-channel", None), ("int4-g128", "bf16", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", [1, 2])
def test_exact_products(weight_name: str, activation_name: str, expected: torch.dtype | None, split: int) -> None:
    random = torch.Generator().manual_seed(3)
    weight_format, activation = parse_format(weight_name), parse_format(activation_name)
    assert eight_bits(weight_format, activation, DEVICE) == expected
    quantized = quantize(torch.randn(40, 200, generator=random), weight_format)
    inputs = torch.randn(5, 200, generator=random).half()
    inputs[1] = 0
    inputs[2] *= 1e-4
    weight = [tensor.to(DEVICE) for tensor in to_layout(pack(quantized), FRAGMENTS).tensors.values()]
    if expected is None:
        output = linear(inputs.to(DEVICE), weight, None, weight_name, 40, 200, FRAGMENTS, activation_name)
        rounded, tolerance = quantize_activation(inputs, activation_name), 1e-3
    else:
        codes, scales = eight_bit_inputs(inputs.to(DEVICE), activation, expected)
        config = Config(block_k=32, split=split)
        output = product(codes, weight, None, weight_format, 40, config, torch.float32, scales)
        rounded, tolerance = fake_quantize(inputs, activation), 1e-6
    truth = rounded.double() @ dequantize(quantized).double().T
    rows = truth.norm(dim=1)
    assert bool(((output.cpu().double() - truth).norm(dim=1) <= tolerance * rows).all())


@pytest.mark.parametrize("name", ["int8-channel", "fp8-e4m3-channel", "mxfp6-e2m3", "int4-g32", "fp8-e5m2", "bf16"])
def test_other_inputs_are_rounded_as_the_reference_does(name: str) -> None:
    inputs = torch.randn(7, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(rounded_inputs(inputs, parse_format(name)), quantize_activation(inputs, name))


@pytest.mark.parametrize("activation", ["int8-channel", "fp8-e4m3-channel"])
def test_linear_uses_the_8_bit_product(activation: str) -> None:
    random = torch.Generator().manual_seed(5)
    format = parse_format("int4-g64" if activation.startswith("int") else "fp8-e4m3-channel")
    quantized = quantize(torch.randn(48, 128, generator=random), format)
    weight = [tensor.to(DEVICE) for tensor in to_layout(pack(quantized), FRAGMENTS).tensors.values()]
    inputs = torch.randn(2, 3, 128, generator=random).half()
    bias = torch.randn(48, generator=random).half()
    output = linear(inputs.to(DEVICE), weight, bias.to(DEVICE), format.name, 48, 128, FRAGMENTS, activation)
    rounded = fake_quantize(inputs.reshape(6, 128), parse_format(activation)).double()
    truth = (rounded @ dequantize(quantized).double().T + bias.double()).reshape(2, 3, 48)
    assert output.dtype == torch.float16
    assert float((output.cpu().double() - truth).norm() / truth.norm()) < torch.finfo(torch.float16).eps
