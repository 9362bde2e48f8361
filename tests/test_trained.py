"""A trained simulation is exported and loaded exactly, whatever the method, with learned scales or not."""

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from tests.mixes import mixed_allocation
from tests.sensitivity.small_models import (
    Convolutions,
    TiedLanguageModel,
    class_batches,
    seed_weights,
    token_batches,
)


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **shape)).eval()


def uniform(model, scheme):
    layers = find_layers(model)
    return Allocation(layers, (scheme,) * len(layers))


def train(student, batches, loss_fn, steps=4, rate=0.02):
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    student.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(student, batches[step % len(batches)]).backward()
        optimizer.step()
    return student.eval()


def same_outputs(loaded, student, inputs):
    expected = student(inputs)
    torch.testing.assert_close(loaded(inputs), expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


SCHEMES = ("int2-channel", "int3-g8", "fp4-e2m1-g16", "int4-g8-asym", "nvfp4", "int4-channel+a:int8-token")


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loaded_model_equals_the_trained_one(scheme, learned, tmp_path):
    model = seed_weights(Convolutions()).eval()
    allocation = uniform(model, scheme)
    batches = class_batches((4, 6, 6))
    student = train(mpq.simulate(model, allocation, "nearest", learned=learned), batches, cross_entropy)
    inputs = batches[0][0]
    assert not torch.allclose(student(inputs), mpq.simulate(model, allocation, "nearest").eval()(inputs), atol=1e-2)
    before = student(inputs)
    mpq.export(student, allocation, tmp_path / "out", method="mse", inputs=inputs)  # compared layer by layer
    assert torch.equal(student(inputs), before)
    loaded = mpq.load(tmp_path / "out", model=Convolutions())
    same_outputs(loaded, student, inputs)
    for layer in allocation.layers:
        numbers = student.get_submodule(layer.name).weight.detach().flatten(1)
        assert torch.equal(loaded.get_submodule(layer.name).weight.dequantize().flatten(1), numbers)


def test_tied_mixed_and_transformers_models_too(tmp_path):
    tied = seed_weights(TiedLanguageModel()).eval()
    allocation = uniform(tied, "int3-g8")
    student = train(mpq.simulate(tied, allocation, learned=True), token_batches(), next_token_loss)
    mpq.export(student, allocation, tmp_path / "tied")
    same_outputs(mpq.load(tmp_path / "tied", model=TiedLanguageModel()), student, token_batches()[0])
    mixed = mixed_allocation(tied)
    student = train(mpq.simulate(tied, mixed, learned=True), token_batches(), next_token_loss)
    mpq.export(student, mixed, tmp_path / "mixed")
    same_outputs(mpq.load(tmp_path / "mixed", model=TiedLanguageModel()), student, token_batches()[0])


def test_a_transformers_model_is_loaded_without_its_class_and_says_how_it_was_rounded(tmp_path):
    model = llama()
    allocation = uniform(model, "int4-g32")
    tokens = torch.arange(24).view(2, 12)
    student = train(mpq.simulate(model, allocation, "nearest", learned=True), [tokens], next_token_loss)
    mpq.export(student, allocation, tmp_path / "out")
    loaded = mpq.load(tmp_path / "out")
    torch.testing.assert_close(loaded(tokens).logits, student(tokens).logits, rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["rounding"] == "nearest, trained"
    assert Allocation.load(tmp_path / "out" / "allocation.json").provenance["rounding"] == "nearest, trained"


def test_a_different_allocation_than_the_trained_one_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    student = mpq.simulate(model, uniform(model, "int4-channel"))
    with pytest.raises(MpqError, match="layer 0 was trained in int4-channel, the allocation has int3-channel"):
        mpq.export(student, uniform(model, "int3-channel"), tmp_path / "out")
    layers = find_layers(model)
    with pytest.raises(MpqError, match="layer 1 was trained in int4-channel, but the allocation leaves it out"):
        mpq.export(student, Allocation(layers[:1], ("int4-channel",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
