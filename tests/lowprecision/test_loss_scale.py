"""Dynamic loss scales back off, grow and keep small gradients; each operand's format applies to that operand only."""

import math

import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.lowprecision import Recipe, convert
from mpq.lowprecision.loss_scale import GROW_AFTER, LARGEST, START, DynamicScale
from mpq.lowprecision.operands import round_operand
from mpq.network.calibration import seeded

E4M3 = "fp4-e2m1-g16-se4m3"  # NVFP4's scales without a scale of the tensor: a narrow range
FORMATS = ("mxfp4", "nvfp4", "fp4-e2m1-g16-sue5m3", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-channel", "int8", "int4-channel",
           "mxfp8-e4m3", "bf16")  # fmt: skip


def one_layer(recipe):
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16, 32, generator=seeded(1)))
    return convert(model, recipe)


def gradients(model, size):
    inputs = torch.randn(8, 32, generator=seeded(2), requires_grad=True)
    upstream = size * torch.randn(8, 16, generator=seeded(3))
    model.zero_grad()
    model(inputs).backward(upstream)
    return upstream, inputs.detach(), inputs.grad, model[0].weight.grad


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_gradients_of_any_size_survive(size):
    model = one_layer(Recipe("fp32", gradients=E4M3, loss_scale="dynamic"))
    for _ in range(12):
        upstream, inputs, _, found = gradients(model, size)
    wanted = upstream.T @ inputs
    assert (found - wanted).norm() < 0.2 * wanted.norm()
    assert (model[0].dynamic.value < START) == (size > 1e-6)
    upstream, inputs, _, found = gradients(one_layer(Recipe("fp32", gradients=E4M3)), size)
    assert ((found - wanted).norm() < 0.2 * wanted.norm()) == (size == 1.0)


def test_the_scale_grows_after_products_within_the_format():
    scale, numbers = DynamicScale(1024.0), torch.ones(3)
    for _ in range(GROW_AFTER - 1):
        scale.update(numbers, numbers)
    assert scale.value == 1024
    scale.update(numbers, numbers)
    assert scale.value == 2048
    scale.update(numbers, numbers / 3)
    scale.update(torch.tensor([math.inf]), numbers)
    scale.update(torch.tensor([math.nan]), numbers)
    assert scale.value == 256
    scale.value = LARGEST
    for _ in range(GROW_AFTER):
        scale.update(numbers, numbers)
    assert scale.value == LARGEST


def test_layers_have_scales_of_their_own():
    model = convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), Recipe(E4M3, loss_scale="dynamic"))
    assert model[0].dynamic is not model[1].dynamic
    assert convert(model, Recipe(E4M3))[0].dynamic is None


@pytest.mark.parametrize("scale", ["static", 0.0, -1.0, math.inf])
def test_other_scales_are_refused(scale):
    with pytest.raises(MpqError, match="loss_scale is a positive number or 'dynamic'"):
        Recipe("nvfp4", loss_scale=scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("role", ["weights", "activations", "gradients"])
def test_each_operand_has_its_own_format(role, format):
    formats = {name: format if name == role else "fp32" for name in ("weights", "activations", "gradients")}
    recipe = Recipe(formats["weights"], activations=formats["activations"], gradients=formats["gradients"])
    model = one_layer(recipe)
    upstream, inputs, by_inputs, by_weight = gradients(model, 1.0)
    weight = model[0].weight.detach()

    def rounded(matrix, name):
        return round_operand(matrix, parse_format(format)) if name == role else matrix

    outputs = rounded(inputs, "activations") @ rounded(weight, "weights").T
    assert torch.allclose(model(inputs), outputs, atol=1e-5)
    assert torch.allclose(by_inputs, rounded(upstream, "gradients") @ rounded(weight.T, "weights").T, atol=1e-4)
    wanted = rounded(upstream.T, "gradients") @ rounded(inputs.T, "activations").T
    assert torch.allclose(by_weight, wanted, atol=1e-4)
