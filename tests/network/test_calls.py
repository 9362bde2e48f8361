"""Layers that are called by name, batches in any container, losses of any kind."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BatchEncoding

import mpq
from mpq.core.errors import MpqError
from mpq.network.calibration import check_loss, cross_entropy, split_batch, take
from mpq.network.layers import find_layers
from mpq.network.offload import offloaded
from mpq.network.ranges import input_ranges
from mpq.quantized import pack_model
from mpq.training.fake import FakeQuantization

Pair = namedtuple("Pair", "inputs labels")


class ByName(nn.Module):
    """Calls its layers as `layer(input=x)`, or without the name: (n, 8) -> (n, 3)."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.named = named

    def forward(self, x):
        """Class logits."""
        tokens = (x[:, 0] > 0).long()
        if not self.named:
            return self.head(torch.relu(self.hidden(x + self.embed(tokens))))
        return self.head(input=torch.relu(self.hidden(input=x + self.embed(input=tokens))))


def batches(pair=tuple):
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(6, 8, generator=generator), torch.arange(6) % 3) for _ in range(2)]
    return [pair(*batch) if pair is Pair else pair(batch) for batch in made]


def profiled(model, metric="kronecker", data=None, loss_fn=cross_entropy, formats=("int3-channel",)):
    return mpq.profile(model, data or batches(), loss_fn, formats=list(formats), metric=metric, progress=False)


@pytest.mark.parametrize("metric", ["kronecker", "fisher", "gptq", "gradient", "hessian", "loss"])
def test_layers_called_by_keyword_score_alike(metric):
    formats = ["int3-channel+a:int4-token"] if metric != "fisher" else ["int3-channel"]
    named, plain = (profiled(ByName(named), metric, formats=formats) for named in (True, False))
    np.testing.assert_array_equal(named.scores, plain.scores)
    assert named.layers == plain.layers  # and their multiply-adds


def test_layers_called_by_keyword_run_in_every_verb():
    formats, layers = ["int4-channel+a:int8-token"], find_layers(ByName(True))
    (_, allocation), *_ = mpq.frontier(profiled(ByName(False), formats=formats)).uniform()
    inputs, _ = batches()[0]
    for change in (lambda model: mpq.simulate(model, allocation), lambda model: pack_model(model, allocation)):
        assert torch.equal(change(ByName(True))(inputs), change(ByName(False))(inputs))
    models = [ByName(True), ByName(False)]
    assert input_ranges(models[0], layers, batches(), cross_entropy) == input_ranges(
        models[1], layers, batches(), cross_entropy
    )
    with offloaded(models[0], "cpu"), offloaded(models[1], "cpu"):
        assert torch.equal(models[0](inputs), models[1](inputs))
    for model in models:
        FakeQuantization(model, layers).schemes = allocation.scheme_of
    assert torch.equal(models[0](inputs), models[1](inputs))


@pytest.mark.parametrize("metric", ["kronecker", "hessian", "eigenvalue"])
def test_named_tuples_are_batches(metric):
    named, plain = (profiled(ByName(False), metric, batches(pair)) for pair in (Pair, tuple))
    np.testing.assert_array_equal(named.scores, plain.scores)


def test_split_batches_keep_their_classes():
    assert [type(part) for part in split_batch(batches(Pair)[0])] == [Pair] * 6
    encoding = BatchEncoding({"input_ids": torch.arange(6).reshape(3, 2), "names": ["a"], "scale": torch.ones(7)})
    part = take(encoding, slice(1, 2))
    assert isinstance(part, BatchEncoding)
    assert part.input_ids.tolist() == [[2, 3]]
    assert (part["names"], len(part["scale"])) == (["a"], 7)  # no samples
    assert len(encoding["input_ids"]) == 3


def test_a_loss_may_be_a_float_where_it_is_only_measured():
    table = profiled(ByName(False), "loss", loss_fn=lambda model, batch: cross_entropy(model, batch).item())
    np.testing.assert_allclose(table.scores, profiled(ByName(False), "loss").scores, atol=1e-6)
    assert check_loss(np.float32(2.0), 0).item() == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: None, "a NoneType"),
        (lambda loss: (loss, 1), "a tuple"),
        (lambda loss: loss.expand(3), r"a tensor \(3,\)"),
        (lambda loss: loss.item(), "no gradient"),
        (lambda loss: loss.detach(), "no gradient"),
    ],
)
@pytest.mark.parametrize("metric", ["kronecker", "fisher", "hessian", "kl-curvature"])
def test_other_losses_are_reported(change, message, metric):
    with pytest.raises(MpqError, match=message):
        profiled(ByName(False), metric, loss_fn=lambda model, batch: change(cross_entropy(model, batch)))


def test_a_summed_loss_is_reported():
    def summed(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    with pytest.raises(MpqError, match="sum over"):
        profiled(ByName(False), loss_fn=summed)


def test_sizes_are_numbers_or_text_and_allocations_are_no_names():
    frontier = mpq.frontier(profiled(ByName(False), formats=["int3-channel", "int8-channel"]))
    assert frontier.at(size="0.2kB") == frontier.at(size=200.0)
    with pytest.raises(MpqError, match=r"invalid size '30x': expected e\.g\. 500MB"):
        frontier.at(size="30x")
    for use in (mpq.simulate, pack_model):
        with pytest.raises(MpqError, match="expected an Allocation, not 'int4-g64'"):
            use(ByName(False), "int4-g64")
