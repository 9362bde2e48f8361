"""Widths and kernels searched with formats: costs by hand, shared weights, and the cut network computes the same."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq
from mpq.core.costs import bitops, weight_bytes
from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers
from mpq.network.macs import count_macs
from mpq.search.architecture import Architecture, Kernel, Width
from mpq.search.controller import Controller, Schedule
from mpq.search.one_shot import OneShot
from mpq.search.repair import likely_within
from tests.one_shot_loop import loop

SPACE = ("int2-channel+a:int8-token", "int4-channel+a:int8-token", "int8-channel+a:int8-token")


class Inverted(nn.Module):
    """Expansion, a depthwise convolution of 5 x 5, projection, a hidden linear layer: (n, 3, 8, 8) -> (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.expand(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = functional.avg_pool2d(self.project(x), 2).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


CHOICES = (
    Width(("expand", "depthwise"), ("project",), (0.5, 1.0), along=("norm1", "norm2")),
    Kernel("depthwise", (1, 3, 5)),
    Kernel("project", (1, 3)),
    Width(("project",), ("hidden",), (0.5, 1.0)),
    Width(("hidden",), ("head",), (0.3, 0.6, 1.0)),
)


def batches(count=4):
    inputs = torch.randn(count, 8, 3, 8, 8, generator=seeded(0))
    return [(x, x.mean((2, 3)).argmax(1)) for x in inputs]


def network():
    torch.manual_seed(1)
    model = Inverted().train()
    for x, _ in batches():
        model(x)  # statistics of the normalizations
    return model


def search_of(model, **options):
    options = {"schedule": Schedule(steps=30, delay=0.2), "target": 0.4, "architecture": CHOICES} | options
    return OneShot(model, SPACE, **options)


def test_masks_keep_the_first_channels_and_the_middle_of_kernels():
    model = network()
    layers = count_macs(model, find_layers(model), batches()[0], cross_entropy)
    architecture = Architecture(model, layers, CHOICES)
    scaled = {layer.name: layer for layer in architecture.scaled(layers, (0, 1, 0, 0, 1))}
    whole = {layer.name: layer for layer in layers}
    shapes = {name: (layer.rows, layer.cols) for name, layer in scaled.items()}
    assert shapes == {
        "expand": (4, 3), "depthwise": (4, 9), "project": (3, 4), "hidden": (6, 48), "head": (4, 6)
    }  # fmt: skip
    assert scaled["depthwise"].macs == whole["depthwise"].macs * 4 * 9 // (8 * 25)
    assert scaled["head"].macs == 6 * 4
    masks = architecture.masks(layers, (1, 0, 1, 1, 2))
    assert list(masks) == ["depthwise"]
    assert masks["depthwise"].view(5, 5).nonzero().tolist() == [[2, 2]]
    masks = architecture.masks(layers, (0, 2, 0, 1, 2))
    assert masks["project"].view(8, 3, 3).nonzero().tolist() == [[c, 1, 1] for c in range(4)]


@pytest.mark.parametrize(("cost", "target"), [("bitops", 0.4), ("size", 0.3)])
def test_costs_are_of_formats_and_architecture_together(cost, target):
    model = network()
    search = search_of(model, cost=cost, target=target)
    loop(model, search, batches(), 1)
    layers = search.layers
    formats, options = [0, 1, 2, 1, 0], [0, 1, 0, 1, 0]
    scaled = search.architecture.scaled(layers, options)

    def price(layer, name):
        scheme = parse_scheme(name)
        return bitops(scheme, layer.macs) if cost == "bitops" else weight_bytes(scheme, layer.rows, layer.cols)

    expected = sum(price(layer, SPACE[choice]) for layer, choice in zip(scaled, formats, strict=True))
    largest = sum(price(layer, SPACE[2]) for layer in layers)
    assert search.cost_of([*formats, *options]) == pytest.approx(expected / largest / target)


@pytest.mark.parametrize("learned", [True, False])
def test_the_cut_network_computes_what_was_trained_and_is_packed_so(learned, tmp_path):
    model = network()
    search = search_of(model, learned=learned, seed=2)
    loop(model, search, batches(), 34, torch.optim.Adam([*model.parameters(), *search.parameters()], lr=0.01))
    model.eval()
    inputs = batches()[0][0]
    with search.chosen() as schemes:
        expected = model(inputs).detach()
    allocation, rounder, cut = search.allocation(), search.rounder(), search.network()
    search.close()
    assert allocation.provenance["cost_over_target"] <= 1
    assert allocation.schemes == tuple(scheme.name for scheme in schemes)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in cut.modules())
    mpq.export(cut, allocation, tmp_path / "out", method=rounder, inputs=inputs)
    loaded = mpq.load(tmp_path / "out", model=cut)
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_cut_network_without_formats_is_the_masked_one():
    model = network().eval()
    layers = find_layers(model)
    architecture = Architecture(model, layers, CHOICES)
    inputs = batches()[0][0]
    for options in ((0, 0, 0, 0, 0), (1, 1, 0, 0, 2), (0, 2, 1, 1, 1), (1, 2, 1, 1, 2)):
        cut, masked = network().eval(), network().eval()
        architecture.cut(cut, options)
        for name, mask in architecture.masks(layers, options).items():
            weight = masked.get_submodule(name).weight
            weight.data = (weight.flatten(1) * mask).view_as(weight)
        torch.testing.assert_close(cut(inputs), masked(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut(inputs), model(inputs))


def test_decisions_never_get_options_they_lack():
    controller = Controller(2, 4, Schedule(steps=400, delay=0.5), counts=(4, 2))
    drawn = []
    for _ in range(400):
        choices = controller.sample()
        drawn.append(choices)
        controller.update(choices, float(choices[0] == 3), 1.0)
    assert set(np.array(drawn)[:, 1].tolist()) == {0, 1}
    assert set(np.array(drawn)[:, 0].tolist()) == {0, 1, 2, 3}
    assert np.isfinite(controller.entropy)
    assert controller.best()[0] == 3


def test_the_final_choice_is_within_a_cost_that_is_no_sum():
    scores = np.log(np.array([[0.1, 0.9], [0.3, 0.7], [0.45, 0.55]]))

    def cost(choices):
        return float(np.prod(1.0 + choices))

    assert likely_within(scores, cost, 8).tolist() == [1, 1, 1]
    assert likely_within(scores, cost, 4).tolist() == [1, 1, 0]
    assert likely_within(scores, cost, 1).tolist() == [0, 0, 0]
    assert likely_within(scores[:, ::-1], cost, 8).tolist() == [1, 1, 1]  # the remaining budget is used
    assert likely_within(scores[:, ::-1], cost, 2).tolist() == [0, 0, 1]  # where that loses the least
    with pytest.raises(MpqError, match="below the cheapest"):
        likely_within(scores, cost, 0.5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Width(("expand",), ("projects",)), "unknown layer 'projects' in a choice: did you mean project"),
        (Width(("expand",), ("project",), (0.5, 0.75)), "ascending from above 0 to 1"),
        (Width(("expand", "project"), ("head",)), "differ in channels"),
        (Kernel("depthwise", (2, 5)), "steps of 2 to 5"),
        (Kernel("head", (1,)), "steps of 2 to 0"),
    ],
)
def test_invalid_choices_are_reported(choice, message):
    with pytest.raises(MpqError, match=message):
        search_of(network(), architecture=(choice,))


def test_groups_of_columns_cannot_be_cut():
    with pytest.raises(MpqError, match="groups of columns cannot be cut"):
        OneShot(network(), ("int2-g4", "int4-g4"), target=0.6, architecture=CHOICES)
