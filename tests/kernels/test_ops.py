import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq.kernels.ops as ops
from mpq.core.allocation import Allocation
from mpq.core.formats import FORMATS, parse_format
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu import panels
from mpq.kernels.layout import pack, to_layout
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model
from mpq.rounding.reference import dequantize, fake_quantize, quantize

ROWS, COLS = 6, 40
CASES = [
    ("int4-g32", ""),
    ("int3-g32-asym", "int8-channel"),
    ("nvfp4", "fp8-e4m3"),
    ("int8", "mxfp8-e4m3"),
    ("bf16", ""),
]

needs_native = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed, shape))


def packed_weight(name):
    quantized = quantize(random(ROWS, COLS), parse_format(name))
    return list(pack(quantized).tensors.values()), dequantize(quantized)


def panels_of(name):
    arranged = to_layout(pack(quantize(random(ROWS, COLS), parse_format(name))), panels.NAME)
    return list(arranged.tensors.values()), (name, ROWS, COLS, panels.NAME)


def packed_layer(layer):
    model = nn.Sequential(layer).eval()
    layers = find_layers(model)
    packed = pack_model(model, Allocation(layers, ("int4-g32",) * len(layers)))
    assert packed[0].weight.layout == panels.NAME
    return packed


LAYERS = [
    (nn.Linear(COLS, ROWS), random(3, COLS)),
    (nn.Conv2d(4, ROWS, 3, padding=1), random(2, 4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=2), random(2, 4, 7, 7)),
    (nn.Conv1d(4, ROWS, 5), random(2, 4, 11)),
    (nn.Embedding(ROWS, COLS), torch.tensor([[0, 5, 2]])),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_ops_are_sound_operators(name, activation, dtype):
    weight, _ = packed_weight(name)
    x = random(2, 3, COLS).to(dtype).requires_grad_()
    bias = random(ROWS).to(dtype).requires_grad_()
    facts = (name, ROWS, COLS, "rows")
    torch.library.opcheck(torch.ops.mpq.linear.default, (x, weight, bias, *facts, activation))
    torch.library.opcheck(torch.ops.mpq.linear.default, (x.detach()[0, 0], weight, None, *facts, activation))
    torch.library.opcheck(torch.ops.mpq.dequantize.default, (weight, *facts))
    torch.library.opcheck(torch.ops.mpq.embedding.default, (torch.tensor([[1, 0, 5]]), weight, *facts, dtype))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_linear_is_a_product_with_the_dequantized_weight(name):
    weight, matrix = packed_weight(name)
    x, bias = random(5, COLS, seed=1), random(ROWS, seed=2)
    out = torch.ops.mpq.linear(x, weight, bias, name, ROWS, COLS, "rows", "")
    assert torch.equal(out, functional.linear(x, matrix, bias))
    rounded = torch.ops.mpq.linear(x, weight, bias, name, ROWS, COLS, "rows", "int8-channel")
    assert torch.equal(rounded, functional.linear(fake_quantize(x, parse_format("int8-channel")), matrix, bias))
    assert torch.equal(torch.ops.mpq.dequantize(weight, name, ROWS, COLS, "rows"), matrix)
    indices = torch.tensor([[5, 0], [2, 5]])
    rows = torch.ops.mpq.embedding(indices, weight, name, ROWS, COLS, "rows", torch.float32)
    assert torch.equal(rows, functional.embedding(indices, matrix))


def test_gradients_are_those_of_the_dequantized_product():
    weight, matrix = packed_weight("int4-g32")
    x, bias = random(2, 5, COLS, seed=1).requires_grad_(), random(ROWS, seed=2).requires_grad_()
    torch.ops.mpq.linear(x, weight, bias, "int4-g32", ROWS, COLS, "rows", "").square().sum().backward()
    plain_x, plain_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    functional.linear(plain_x, matrix, plain_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(bias.grad, plain_bias.grad)


def test_a_backend_serves_its_layout_and_device_alone(monkeypatch):
    weight, matrix = packed_weight("int8")
    monkeypatch.setitem(ops.KERNELS, ("linear", "rows", "cpu"), lambda input, *rest: input[..., :ROWS] * 0 + 7)
    assert bool((torch.ops.mpq.linear(random(2, COLS), weight, None, "int8", ROWS, COLS, "rows", "") == 7).all())
    assert torch.equal(torch.ops.mpq.dequantize(weight, "int8", ROWS, COLS, "rows"), matrix)


def test_empty_input():
    weight, _ = packed_weight("int4-g32")
    out = torch.ops.mpq.linear(torch.empty(0, COLS), weight, None, "int4-g32", ROWS, COLS, "rows", "int8-channel")
    assert out.shape == (0, ROWS)


def test_compiled_graphs_keep_the_op():
    weight, matrix = packed_weight("int4-g32")

    def double(x):
        return torch.ops.mpq.linear(x, weight, None, "int4-g32", ROWS, COLS, "rows", "") * 2

    x = random(3, COLS)
    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), functional.linear(x, matrix) * 2)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "activation"), CASES[:-1])
def test_ops_are_sound_operators_in_panels(name, activation, dtype):
    weight, facts = panels_of(name)
    x, bias = random(2, 3, COLS).to(dtype).requires_grad_(), random(ROWS).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mpq.linear.default, (x, weight, bias, *facts, activation))
    torch.library.opcheck(torch.ops.mpq.linear.default, (x.detach()[0, 0], weight, None, *facts, activation))
    torch.library.opcheck(torch.ops.mpq.dequantize.default, (weight, *facts))
    torch.library.opcheck(torch.ops.mpq.embedding.default, (torch.tensor([[1, 0, 5]]), weight, *facts, dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_a_sound_operator(dtype):
    weights = [panels_of(name) for name in ("int4-g32", "int8-channel")]
    tensors = [weight[0] for weight, _ in weights]
    places = torch.arange(2 * ROWS).reshape(ROWS, 2).T.flatten()
    facts = ("int4-g32/int8-channel", [ROWS, ROWS], COLS, panels.NAME, "")
    x, bias = random(2, 3, COLS).to(dtype).requires_grad_(), random(2 * ROWS).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mpq.linear_parts.default, (x, tensors, places, bias, *facts))
    torch.library.opcheck(torch.ops.mpq.linear_parts.default, (x.detach()[0, 0], tensors, places, None, *facts))
    torch.ops.mpq.linear_parts(x, tensors, places, bias, *facts).float().square().sum().backward()
    matrix = torch.empty(2 * ROWS, COLS)
    matrix[places] = torch.cat([torch.ops.mpq.dequantize(weight, *facts) for weight, facts in weights])
    plain_x, plain_bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    functional.linear(plain_x.float(), matrix, plain_bias.float()).square().sum().backward()
    room = {"rtol": 2**-6, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-2}
    torch.testing.assert_close(x.grad, plain_x.grad, **room)
    torch.testing.assert_close(bias.grad, plain_bias.grad, **room)


@needs_native
@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda value: type(value).__name__)
def test_compiled_layers_in_panels_equal_the_plain_ones(layer, x):
    model = packed_layer(layer)
    plain, compiled = model(x), torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert plain.dtype == compiled.dtype
    assert torch.equal(plain, compiled)


@needs_native
@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda value: type(value).__name__)
def test_autocast_takes_layers_in_panels(layer, x):
    """Bfloat16 rounds inputs, weights and sums by 2**-8 each at most, relative to the sums of magnitudes."""
    model = packed_layer(layer)
    plain = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype in (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))
