"""A consumer's predictions compared with ours: equal for the same model."""

import math
import sys

import pytest
import torch

from experiments.models.tiny_llama import tiny_llama
from experiments.peers.served import _divergence, compared, served, simulated
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded
from mpq.sources import open_source

TOKENS = torch.randint(0, 1024, (2, 24), generator=seeded(3))


def test_the_bundled_model_is_a_llama_of_transformers():
    model = open_source("tiny-lm", nsamples=1).model
    with torch.no_grad():
        assert torch.allclose(tiny_llama(model)(TOKENS).logits, model(TOKENS), atol=1e-3)


def test_the_gap_is_zero_for_equal_weights_alone(tmp_path):
    model = tiny_llama(TinyLM(LMConfig(layers=1)).eval())
    model.save_pretrained(tmp_path)
    theirs = served(sys.executable, "transformers", tmp_path, TOKENS)
    assert theirs.perplexity == pytest.approx(simulated(model, TOKENS).perplexity, rel=1e-5)
    assert [line.split()[4] for line in compared("same", model, TOKENS, theirs)] == ["ok", "ok"]
    with torch.no_grad():
        model.model.norm.weight.neg_()
    assert compared("other", model, TOKENS, theirs)[1].split()[4] == "short"


def test_divergence_merges_the_remaining_tokens_into_one():
    theirs, ours = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(_divergence(theirs, ours)) == pytest.approx(expected)
    assert float(_divergence(ours, ours)) == 0
