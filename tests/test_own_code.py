"""Layers with a custom forward, and weights that are read without calling their module."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import load
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers, layer_kind, own_code
from mpq.quantized import simulate


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 8.0


class Offset(nn.Embedding):
    def forward(self, hidden):
        return super().forward(torch.arange(hidden.shape[1]) + 2)


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


class Same(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(functional.pad(x, (0, 2, 0, 2)), self.weight, self.bias, self.stride)


class HalfScale(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * 0.5, self.bias)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.p, self.h = nn.Embedding(50, 32), Offset(20, 32), nn.Linear(32, 50)

    def forward(self, x):
        hidden = self.e(x)
        return self.h(torch.tanh(hidden + self.p(hidden)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.f = nn.Embedding(50, 64), nn.Linear(64, 64)

    def forward(self, x):
        return functional.linear(torch.tanh(self.f(self.e(x))), self.e.weight)


class Query(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.f = nn.Embedding(7, 64), nn.Linear(64, 64)

    def forward(self, x):
        return torch.tanh(self.q.weight + self.f(self.q(x))[:, :7]).mean(1)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.randn(50, 64) * 0.3)
        self.h = nn.Linear(64, 50, bias=False)
        self.h.weight = self.t

    def forward(self, x):
        return self.h(torch.tanh(self.t[x]))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.e(x))


TOKENS = torch.randint(0, 7, (3, 9), generator=seeded(0, "tokens"))
IMAGES = torch.randn(2, 3, 8, 8, generator=seeded(0, "images"))
MODELS = {
    "scaled embedding": (lambda: nn.Sequential(Scaled(50, 32), nn.Linear(32, 50)), TOKENS),
    "positions": (Positions, TOKENS),
    "standardized convolution": (lambda: nn.Sequential(Standardized(3, 16, 3), nn.Flatten()), IMAGES),
    "same convolution": (lambda: nn.Sequential(Same(3, 16, 3), nn.Flatten()), IMAGES),
    "scaled linear": (lambda: nn.Sequential(nn.Embedding(50, 32), HalfScale(32, 5)), TOKENS),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 2, groups=1), nn.Flatten()),
        IMAGES[:, :, None].repeat(1, 1, 3, 1, 1),
    ),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.Flatten()), IMAGES),
    "grouped transposed convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Flatten()),
        IMAGES,
    ),
    "head through the embedding": (Tied, TOKENS),
    "queries": (Query, TOKENS),
    "head through a parameter": (Raw, TOKENS),
    "transformer encoder": (Encoder, TOKENS),
}


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel+a:int8-token"])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_models_compute_what_simulated_ones_do(name, scheme, tmp_path):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    layers = find_layers(model)
    allocation = Allocation(layers, tuple(scheme.split("+")[0] if x.kind == "embedding" else scheme for x in layers))
    with torch.no_grad():
        expected = simulate(model, allocation, trainable=False)(inputs)
        export(model, allocation, tmp_path / "out", inputs=inputs)
        loaded = load(tmp_path / "out", model=copy.deepcopy(model))
        room = 2e-3 * expected.abs().max().item()
        torch.testing.assert_close(loaded(inputs), expected, atol=room, rtol=0)
        torch.testing.assert_close(simulate(model, allocation)(inputs), expected, atol=room, rtol=0)
        assert (model(inputs) - expected).abs().max() > 1e-4  # the formats change the outputs


def test_modules_with_code_of_their_own_are_distinguished_from_plain_ones():
    assert own_code(Scaled(4, 4))
    assert own_code(Standardized(4, 4, 1))
    assert not own_code(nn.Linear(4, 4))
    assert not own_code(nn.Conv1d(4, 4, 1))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert own_code(patched)


def test_replaced_weights_are_not_layers():
    fp8 = nn.Linear(4, 4)
    fp8.weight = nn.Parameter(fp8.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert layer_kind(fp8) is None


def test_a_parameter_tied_after_building_is_tied_again_by_loading(tmp_path):
    model = Raw().eval()
    export(model, Allocation(find_layers(model), ("int8-channel",)), tmp_path / "out", inputs=TOKENS)
    untied = Raw().eval()
    untied.h.weight = nn.Parameter(torch.zeros(50, 64))
    loaded = load(tmp_path / "out", model=untied)
    assert loaded.t is loaded.h.weight
