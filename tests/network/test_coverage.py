"""The quantized share of a model, and the reasons for the rest."""

import pytest
import torch
from torch import nn

from mpq.network.calibration import cross_entropy, seeded
from mpq.network.coverage import ATTENTION, EXCLUDED, FOREIGN, RECURRENT, VECTORS, Coverage, coverage
from mpq.network.layers import find_layers
from mpq.network.macs import count_all_macs
from mpq.sensitivity.profile import profile


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm, self.h, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 8), nn.Linear(8, 4)
        self.fp8 = nn.Linear(4, 4, bias=False)
        self.fp8.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(3, 5))

    def forward(self, x):
        x = self.norm(self.e(x))
        x = self.lstm(self.attention(x, x, x)[0])[0].mean(1)
        return self.head(self.h(x))


def test_every_parameter_is_quantized_or_left_for_a_reason():
    model = Mixed()
    layers = find_layers(model, exclude="head")
    found = coverage(model, layers)
    sizes = {each.reason: each.params for each in found.left}
    assert found.params == sum(parameter.numel() for parameter in model.parameters())
    assert found.quantized == 20 * 16 + 8 * 16
    assert found.quantized + sum(sizes.values()) == found.params
    assert sizes == {
        ATTENTION: 4 * 16 * 16,
        RECURRENT: 2 * 64 * 16,
        VECTORS: 32 + 64 + 128 + 8 + 4,
        EXCLUDED: 32,
        FOREIGN: 16,
        "parameters of Mixed": 15,
    }
    assert "Quantized: " in str(found)
    assert ATTENTION in str(found)
    assert Coverage.from_json(found.to_json()).rows() == found.rows()


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20, bias=False))
    model[1].weight = model[0].weight
    found = coverage(model, find_layers(model))
    assert (found.params, found.quantized, found.left) == (320, 320, ())


@pytest.mark.parametrize("transposed", [False, True])
def test_multiply_adds_agree_with_the_counter_of_torch(transposed):
    conv = nn.ConvTranspose2d(4, 6, 3, 2) if transposed else nn.Conv2d(4, 6, 3, 2, groups=2)
    model = nn.Sequential(conv, nn.Flatten(1), nn.LazyLinear(4))
    batch = torch.randn(3, 4, 8, 8, generator=seeded(0, "x"))
    model(batch)
    layers, macs = count_all_macs(model, find_layers(model), batch, lambda model, batch: model(batch))
    assert sum(layer.macs for layer in layers) == macs > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_multiply_adds_of_recurrent_modules_count(kind):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    model = Reader()
    layers, macs = count_all_macs(model, find_layers(model), torch.randn(3, 5, 8), lambda model, batch: model(batch))
    gates = {nn.LSTM: 4, nn.GRU: 3}[kind]
    assert (layers[0].macs, macs) == (64, 64 + 5 * gates * (8 * 16 + 16 * 16))


def test_tables_record_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.randn(4, 8, generator=seeded(0, "x")), torch.arange(4))]
    table = profile(model, batches, cross_entropy, ["int4-g8"], include="0", progress=False)
    found = Coverage.from_json(table.provenance["coverage"])
    assert (found.quantized, found.macs, found.quantized_macs) == (128, 128 + 64, 128)
