"""Results do not depend on torch's default dtype, nor rounding on its default device, which some programs set."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.kernels import layout
from mpq.kernels.cpu import panels
from mpq.network.moments import second_moments
from mpq.rounding import METHODS, codes, compiled, hadamard, method_named, stochastic
from mpq.rounding.reference import dequantize
from mpq.rounding.store import MethodRounder
from mpq.sensitivity import METRICS

FORMATS = ("int3-g8", "nl4-g8", "nvfp4", "int4-g8-asym", "q4_k", "fp8-e4m3", "int4-g8+a:int8-token")
BATCHES = [(torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(i)), torch.arange(6)) for i in (0, 1)]


class Net(nn.Module):
    """An embedding and three kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, tokens):
        """Class logits."""
        return self.out(self.norm(self.conv(self.embed(tokens).mT)).relu().mean(2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other(request):
    """Run something under another default dtype."""

    def under(function):
        forget()
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)
            forget()

    return under


def forget():
    """Drop tables that are made once, in whatever dtype was the default then."""
    tables = (
        compiled._described, codes.decode_table, stochastic.ascending, hadamard._matrix, layout._block,
        panels.levels_of, panels.bit_map_of,
    )  # fmt: skip
    for table in tables:
        table.cache_clear()


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("metric", METRICS)
def test_scores(net, other, metric):
    formats = FORMATS if METRICS[metric].activations else FORMATS[:-1]

    def scores():
        return mpq.profile(net, BATCHES, cross_entropy, formats, metric=metric, progress=False)

    assert np.array_equal(other(scores).scores, scores().scores)


@pytest.mark.parametrize("method", METHODS)
def test_rounded_models(net, other, method, tmp_path):
    layers = mpq.profile(net, BATCHES, cross_entropy, ["int4-g8"], progress=False).layers
    for scheme in FORMATS:
        allocation = Allocation(layers, (scheme,) * len(layers))

        def logits(allocation=allocation, folder=tmp_path / scheme):
            moments = second_moments(net, layers, BATCHES, cross_entropy)
            simulated = mpq.simulate(net, allocation, method, moments, trainable=False)
            rounder = MethodRounder(method, moments)
            mpq.export(net, allocation, folder, method=rounder, inputs=lambda model: model(BATCHES[0][0]))
            loaded = mpq.load(folder, model=Net())
            return simulated.eval()(BATCHES[0][0]), loaded(BATCHES[0][0])

        for ours, expected in zip(other(logits), logits(), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_rounding_under_another_default_device(net, method):
    """Compiled code writes into tensors on the CPU."""
    weight, moment = net.out.weight.detach().repeat(1, 16), torch.eye(256)[None]
    for name in FORMATS[:-1]:
        expected = dequantize(method_named(method)(weight, parse_format(name), moment))
        with torch.device("meta"):
            found = dequantize(method_named(method)(weight, parse_format(name), moment))
        assert torch.equal(found, expected)


def test_another_default_device_is_refused_before_any_work(net):
    with torch.device("meta"), pytest.raises(MpqError, match=r"default device is meta.*set_default_device\('cpu'\)"):
        mpq.profile(net, BATCHES, cross_entropy, ["int4-g8"], progress=False)
    assert torch.get_default_device().type == "cpu"
