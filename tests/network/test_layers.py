"""Layers of a model as matrices: found, tied, counted, against the modules' own arithmetic."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpq.core.errors import MpqError
from mpq.network.calibration import seeded
from mpq.network.layers import (
    find_layers,
    input_matrix,
    matrix_to_weight,
    output_matrix,
    weight_groups,
    weight_matrix,
)
from mpq.network.macs import count_macs
from mpq.network.moments import second_moments

MODULES = {
    "linear": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "transformers": (Conv1D(5, 6), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, bias=False), (2, 4, 9)),
    "conv1d grouped": (nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 7, 6)),
    "conv2d same": (nn.Conv2d(3, 4, (4, 3), padding="same", bias=False), (2, 3, 7, 6)),
    "conv2d valid": (nn.Conv2d(3, 4, 3, padding="valid", bias=False), (2, 3, 7, 6)),
    "conv2d circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False), (2, 3, 7, 6)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 5, 6)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (2, 4, 5, 6)),
    "conv2d single": (nn.Conv2d(3, 4, 3, bias=False), (3, 7, 6)),
}


@pytest.mark.parametrize("name", MODULES)
def test_input_matrix_times_weight_matrix_is_the_layer(name):
    module, shape = MODULES[name]
    inputs = torch.randn(shape, generator=seeded(0, name))
    columns, weight = input_matrix(module, inputs), weight_matrix(module)
    groups = weight_groups(module)
    assert columns.ndim == (3 if groups > 1 else 2)
    product = columns @ weight.reshape(groups, -1, weight.shape[1]).mT.squeeze(0)
    torch.testing.assert_close(product, output_matrix(module, module(inputs)))


@pytest.mark.parametrize("name", MODULES)
def test_weights_are_reshaped_to_their_module(name):
    module, _ = MODULES[name]
    assert torch.equal(matrix_to_weight(weight_matrix(module), module), module.weight)


class Attention(nn.Module):
    """Grouped-query projections and a gated feed-forward part."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)


class Tied(nn.Module):
    """An embedding that is also the output layer, around attention and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.twice(self.twice(self.embed(tokens))))


def test_shared_weights_are_one_layer():
    layers = find_layers(Tied())
    assert layers[0].name == "embed"
    assert layers[0].aliases == ("head",)
    assert layers[0].kind == "embedding"
    assert "head" not in [layer.name for layer in layers]
    assert len(layers) == 1 + 2 * 7 + 1


def test_a_shared_weight_is_picked_by_any_of_its_names():
    assert [layer.name for layer in find_layers(Tied(), include="head")] == ["embed"]
    assert "embed" not in [layer.name for layer in find_layers(Tied(), exclude="head")]


def test_fused_siblings_are_tied():
    ties = {layer.name: layer.tie for layer in find_layers(Tied(), include="blocks.1.*")}
    assert {ties[f"blocks.1.{leaf}_proj"] for leaf in "qkv"} == {"blocks.1.qkv"}
    assert ties["blocks.1.gate_proj"] == ties["blocks.1.up_proj"] == "blocks.1.gate_up"
    assert ties["blocks.1.o_proj"] == ties["blocks.1.down_proj"] == ""


def test_a_sibling_alone_is_not_tied():
    (layer,) = find_layers(Tied(), include="blocks.0.q_proj")
    assert layer.tie == ""


def test_patterns_without_match_are_reported():
    with pytest.raises(MpqError, match="did you mean"):
        find_layers(Tied(), exclude=("heed",))
    with pytest.raises(MpqError, match="no layer is left"):
        find_layers(Tied(), exclude="*")


def test_models_without_layers_are_reported():
    with pytest.raises(MpqError, match="no layer to quantize"):
        find_layers(nn.Sequential(nn.ReLU()))
    with pytest.raises(MpqError, match="wrap it"):
        find_layers(nn.Linear(2, 2))


def test_attention_that_never_calls_its_projection_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert [layer.name for layer in find_layers(model)] == ["linear1", "linear2"]


def test_macs_count_every_use_and_no_look_ups():
    model = Tied().train()
    layers = count_macs(model, find_layers(model), torch.zeros(3, 5, dtype=torch.long), lambda model, x: model(x))
    macs = {layer.name: layer.macs for layer in layers}
    assert macs["embed"] == 5 * 80
    assert macs["twice"] == 2 * 5 * 64
    assert macs["blocks.0.q_proj"] == 0
    assert model.training


def test_macs_of_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=1))
    (layer,) = count_macs(model, find_layers(model), torch.zeros(2, 4, 8, 6), lambda model, x: model(x))
    assert layer.macs == 8 * 4 * 3 * (2 * 9)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d grouped", "transformers"])
def test_second_moments_are_means_of_outer_products(name):
    module, shape = MODULES[name]
    model = nn.Sequential(module)
    batches = [torch.randn(shape, generator=seeded(index, name)) for index in range(3)]
    (moment,) = second_moments(model, find_layers(model), batches, lambda model, x: model(x)).values()
    rows = torch.cat([input_matrix(module, batch) for batch in batches], -2)
    expected = torch.stack(
        [
            torch.stack([torch.outer(x, x) for x in block]).mean(0)
            for block in rows.reshape(weight_groups(module), -1, rows.shape[-1])
        ]
    )
    torch.testing.assert_close(moment.reshape(expected.shape), expected)


def test_second_moments_of_a_tied_embedding_are_the_output_layers():
    model = Tied()
    moments = second_moments(model, find_layers(model), [torch.arange(10).view(2, 5)], lambda model, x: model(x))
    assert set(moments) == {"embed", "twice"}
    assert moments["embed"].shape == (8, 8)
