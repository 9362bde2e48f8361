"""A packed weight read as a tensor by code that does not know packing."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.formats import parse_format
from mpq.kernels.layout import pack
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import seeded
from mpq.rounding.reference import quantize


@pytest.fixture
def weight():
    matrix = torch.randn(6, 16, generator=seeded(0, "weight"))
    return PackedWeight(pack(quantize(matrix, parse_format("int4-g16"))))


READS = {
    "plus": lambda w, x: w + x,
    "from the left": lambda w, x: x + w,
    "product": lambda w, x: x @ w.t(),
    "right of a product": lambda w, x: x @ w.T,
    "method": lambda w, x: w.unsqueeze(0).squeeze(),
    "linear": lambda w, x: functional.linear(x, w),
    "linear in another type": lambda w, x: functional.linear(x.double(), w.double()),
    "look-up": lambda w, x: functional.embedding(torch.tensor([[5, 0]]), w),
    "rows": lambda w, x: w[torch.tensor([5, -1])],
    "slice": lambda w, x: w[:3, ::2],
    "mean": lambda w, x: torch.mean(w, 1),
    "list": lambda w, x: torch.cat([w, x]),
    "convolution": lambda w, x: functional.conv1d(x[None, :, :4], w.view(4, 6, 4), padding=2),
    "negative": lambda w, x: -w,
}


@pytest.mark.parametrize("name", READS)
def test_reads_return_the_dequantized_weight(weight, name):
    x = torch.randn(6, 16, generator=seeded(0, "x"))
    torch.testing.assert_close(READS[name](weight, x), READS[name](weight.dequantize(), x), atol=1e-3, rtol=1e-3)


def test_attributes_are_those_of_the_packed_weight():
    conv = nn.Conv2d(4, 6, 2).bfloat16()
    packed = pack(quantize(conv.weight.detach().flatten(1), parse_format("int8-channel")))
    weight = PackedWeight(packed, torch.bfloat16, conv.weight.shape)
    assert (weight.shape, weight.dtype, weight.ndim, weight.size(1)) == ((6, 4, 2, 2), torch.bfloat16, 4, 4)
    assert weight.device == conv.weight.device
    assert not weight.requires_grad
    assert torch.equal(weight.mean((1, 2, 3)), weight.numbers().mean((1, 2, 3)))
    transposed = PackedWeight(packed, torch.float32, (16, 6), transposed=True)
    assert torch.equal(transposed.numbers(), transposed.dequantize().t())


def test_casting_the_weight_does_not_change_it(weight):
    assert weight.to(torch.float16).dtype == torch.float16
    assert weight.half().dtype == torch.float16
    assert weight.dtype == torch.float32


def test_unknown_attributes_raise_attribute_errors(weight):
    assert not hasattr(weight, "no_such_thing")
