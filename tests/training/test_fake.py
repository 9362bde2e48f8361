"""Fake quantization inside a model: values, gradients, ranges, and complete removal."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.scheme import parse_scheme
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.quantized import simulate
from mpq.rounding.activations import fake_quantize_inputs
from mpq.rounding.reference import dequantize, fake_quantize, quantize
from mpq.training.fake import FakeQuantization
from tests.mixes import mixed_allocation
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, class_batches, seed_weights, token_batches


def attached(model, scheme, **options):
    layers = find_layers(model)
    quantization = FakeQuantization(model, layers, **options)
    quantization.use({layer.name: parse_scheme(scheme) for layer in layers})
    return quantization


def with_rounded_weights(model, format):
    """The same model with its weights rounded by hand."""
    with torch.no_grad():
        for layer in find_layers(model):
            module = model.get_submodule(layer.name)
            module.weight.copy_(matrix_to_weight(fake_quantize(weight_matrix(module), format), module))
    return model


@pytest.mark.parametrize("scheme", ["int3-channel", "int4-g5", "fp4-e2m1-g8", "bf16"])
@pytest.mark.parametrize("kind", [Convolutions, TiedLanguageModel])
def test_outputs_and_gradients_are_those_at_the_rounded_weights(kind, scheme):
    model, truth = seed_weights(kind()).eval(), with_rounded_weights(seed_weights(kind()).eval(), parse_format(scheme))
    inputs = class_batches((4, 6, 6))[0][0] if kind is Convolutions else token_batches()[0]
    attached(model, scheme)
    output, expected = model(inputs), truth(inputs)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("kind", [Convolutions, TiedLanguageModel])
def test_rows_compute_in_formats_of_their_own(kind):
    model = seed_weights(kind()).eval()
    allocation = mixed_allocation(model)
    expected = simulate(model, allocation, "nearest", trainable=False)
    quantization = FakeQuantization(model, allocation.layers, method="nearest")
    quantization.use(allocation.scheme_of)
    inputs = class_batches((4, 6, 6))[0][0] if kind is Convolutions else token_batches()[0]
    torch.testing.assert_close(model(inputs), expected(inputs))


def test_convolutions_have_a_scale_for_each_output_channel():
    conv = nn.Conv2d(3, 4, 2, bias=False)
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1, 1))
    model = nn.Sequential(conv)
    attached(model, "int8-channel-sfp32")
    pixels = torch.eye(12).reshape(12, 3, 2, 2)
    rounded = model(pixels).detach().reshape(12, 4).t().reshape(4, 3, 2, 2)
    steps = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    assert ((rounded - conv.weight.detach()).abs() <= steps * 0.5001).all()


def test_detaching_restores_the_model():
    model = seed_weights(Convolutions()).eval()
    inputs = class_batches((4, 6, 6))[0][0]
    before, state = model(inputs), {name: value.clone() for name, value in model.state_dict().items()}
    quantization = attached(model, "int2-channel+a:int4")
    assert not torch.equal(model(inputs), before)
    assert set(model.state_dict()) == set(state)
    with pytest.raises(RuntimeError):
        model(inputs[:, :1])  # a pass that fails half-way
    quantization.use({})
    assert torch.equal(model(inputs), before)
    quantization.use({"first": parse_scheme("int2-channel")})
    quantization.remove()
    assert torch.equal(model(inputs), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all("weight" not in module.__dict__ for module in model.modules())


def test_ranges_are_a_moving_average_that_only_training_moves():
    model = nn.Sequential(nn.Linear(3, 2))
    quantization = attached(model, "bf16+a:int8", decay=0.75)
    for largest in (4.0, 8.0, 2.0):
        model(torch.tensor([[0.5, -largest, 1.0]]))
    expected = 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 2
    assert quantization.ranges.item() == pytest.approx(expected)
    model.eval()
    inputs = torch.tensor([[100.0, 1.0, -0.3]], requires_grad=True)
    output = model(inputs)
    assert quantization.ranges.item() == pytest.approx(expected)
    scale = expected / 127
    rounded = torch.tensor([[127 * scale, round(1 / scale) * scale, round(-0.3 / scale) * scale]])
    weight = model[0].weight.bfloat16().float()
    torch.testing.assert_close(output, functional.linear(rounded, weight, model[0].bias))
    output.sum().backward()
    torch.testing.assert_close(inputs.grad[0], weight.sum(0) * torch.tensor([0.0, 1.0, 1.0]))  # clipped: no gradient


def test_nan_inputs_are_reported():
    model = nn.Sequential(nn.Linear(3, 2))
    attached(model, "bf16+a:int8")
    for value in (float("nan"), float("-inf")):
        with pytest.raises(MpqError, match="the inputs of 0 hold NaN or infinite numbers"):
            model(torch.tensor([[0.5, value, 1.0]]))


def test_activations_with_scales_per_token_are_rounded_on_the_fly():
    model = seed_weights(Convolutions()).eval()
    inputs = class_batches((4, 6, 6))[0][0]
    quantization = attached(model, "fp32+a:int4-token")
    seen = {}
    for name in ("first", "depthwise"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].detach()}))
    model(inputs)
    format = parse_format("int4-channel")
    assert torch.equal(seen["first"], fake_quantize_inputs(model.first, inputs, format))
    assert quantization.ranges.isnan().all()


def test_learned_scales_are_parameters_that_get_gradients():
    model = seed_weights(Convolutions()).eval()
    quantization = attached(model, "int3-channel", learned=[parse_format("int3-channel"), parse_format("int2")])
    assert len(list(quantization.parameters())) == 2 * len(find_layers(model))
    model(class_batches((4, 6, 6))[0][0]).square().sum().backward()
    used = {name for name, parameter in quantization.named_parameters() if parameter.grad is not None}
    assert used == {f"learned.{index}.int3-channel.shift" for index in range(len(find_layers(model)))}


@pytest.mark.parametrize("learned", [True, False])
def test_baked_weights_compute_the_same(learned):
    model = seed_weights(TiedLanguageModel()).eval()
    format = parse_format("int4-channel")
    quantization = attached(model, format.name, learned=[format] if learned else [])
    tokens = token_batches()[0]
    expected = model(tokens)
    quantization.bake()
    assert torch.equal(model(tokens), expected)
    assert model.head.weight is model.embed.weight


def test_the_method_finds_the_scales():
    model = nn.Sequential(nn.Linear(64, 3, bias=False))
    attached(model, "int2-channel", method="mse")
    rounded = model(torch.eye(64)).detach().t()
    nearest = dequantize(quantize(model[0].weight, parse_format("int2-channel")))
    assert (rounded - model[0].weight).square().sum() < (nearest - model[0].weight).square().sum()


def test_invalid_arguments_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    layers = find_layers(model)
    with pytest.raises(MpqError, match="unknown layer '1'"):
        FakeQuantization(model, layers).use({"1": parse_scheme("int8")})
    with pytest.raises(MpqError, match="gptq needs the layers' inputs"):
        FakeQuantization(model, layers, method="gptq")
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(MpqError, match="the weight of 0 is computed"):
        FakeQuantization(model, layers)
