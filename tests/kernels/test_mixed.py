"""A packed weight with formats by row computes the products of its rows, each in its format."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.formats import parse_format
from mpq.core.mix import mix_of
from mpq.kernels.layout import pack, tensor_specs, unpack
from mpq.kernels.mixed import MixedWeight, packed_weight
from mpq.network.calibration import seeded
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import dequantize, quantize
from tests.mixes import INTEGERS, random_mix

CASES = {
    "integers": (INTEGERS, 70, 32),
    "one row": (("int2-g64", "int4-g64"), 1, 64),
    "more formats than rows": (("int2-channel", "int3-channel", "int4-channel", "int8-channel"), 3, 40),
    "whole panels": (("int3-g64", "int4-g64"), 256, 128),
    "a float copy": (("int4-g32", "bf16"), 9, 33),
    "zero points and floats": (("int4-g32-asym", "fp8-e4m3-channel", "nf4-g64"), 20, 100),
}


def rounded(name):
    formats, rows, cols = CASES[name]
    matrix = torch.randn(rows, cols, generator=seeded(0, name))
    mix = random_mix(formats, rows, cols)
    return mix, mixed(mix, [quantize(matrix, format) for format in mix.formats]), matrix


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_rounded_in_its_format(name):
    mix, found, matrix = rounded(name)
    numbers = dequantize(found)
    for row, place in enumerate(mix.assigned(*matrix.shape)):
        assert torch.equal(numbers[row], dequantize(quantize(matrix, mix.formats[place]))[row])
    packed = pack(found)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.tensors.items()} == tensor_specs(mix, *matrix.shape)
    assert packed.nbytes == mix.nbytes(*matrix.shape)
    assert torch.equal(dequantize(unpack(packed)), numbers)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 20])
def test_products_and_lookups(name, tokens):
    _, found, matrix = rounded(name)
    numbers = dequantize(found)
    weight = packed_weight(pack(found))
    weight.arrange()
    assert isinstance(weight, MixedWeight)
    assert torch.equal(weight.dequantize(), numbers)
    x = torch.randn(tokens, matrix.shape[1], generator=seeded(1))
    bias = torch.randn(len(matrix), generator=seeded(2))
    torch.testing.assert_close(weight.linear(x, bias), functional.linear(x, numbers, bias), rtol=1e-4, atol=5e-3)
    indices = torch.randint(0, len(matrix), (2, 5), generator=seeded(3))
    assert torch.equal(weight.lookup(indices), numbers[indices])
    for index in indices[:1].split(1, 1):
        assert torch.equal(weight.lookup(index), numbers[index])
    assert torch.equal(functional.embedding(indices, weight), numbers[indices])


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    mix = random_mix(INTEGERS, 6, 36 // groups)
    matrix = torch.randn(6, 36 // groups, generator=seeded(0, "conv"))
    found = mixed(mix, [quantize(matrix, format) for format in mix.formats])
    x, bias = torch.randn(2, 4, 5, 5, generator=seeded(1)), torch.randn(6, generator=seeded(2))
    weight, spatial = packed_weight(pack(found)), ([3, 3], [2, 2], [1, 1], [1, 1], groups)
    expected = functional.conv2d(x, dequantize(found).reshape(6, -1, 3, 3), bias, 2, 1, 1, groups)
    torch.testing.assert_close(weight.conv(x, bias, spatial), expected, rtol=1e-4, atol=1e-3)


def test_loading_a_state_dict_restores_the_row_order():
    _, found, matrix = rounded("integers")
    weight = packed_weight(pack(found))
    flipped = weight.format.with_assignment(weight.format.assignment[::-1])
    other = packed_weight(pack(mixed(flipped, [quantize(matrix, format) for format in flipped.formats])))
    weight.arrange()
    other.arrange()
    weight.load_state_dict(other.state_dict())
    assert torch.equal(weight.dequantize(), other.dequantize())
    assert weight.format.assignment == flipped.assignment


def test_types_follow_the_model_and_gradients_reach_the_input():
    _, found, matrix = rounded("integers")
    weight = packed_weight(pack(found)).to(torch.float32)
    holder = nn.Module()
    holder.weight = packed_weight(pack(found))
    holder.bfloat16()
    assert holder.weight.lookup(torch.tensor([3])).dtype == torch.bfloat16
    assert holder.weight.dequantize().dtype == torch.float32
    x = torch.randn(3, matrix.shape[1], generator=seeded(4), requires_grad=True)
    holder.weight.linear(x, None).sum().backward()
    torch.testing.assert_close(x.grad, dequantize(found).sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    assert weight.shape == matrix.shape


def test_a_mix_needs_an_assignment():
    mix = mix_of([parse_format("int2-g4"), parse_format("int4-g4")], 5.0)
    with pytest.raises(Exception, match="which row has which format"):
        mixed(mix, [quantize(torch.ones(4, 8), format) for format in mix.formats])
