import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.lowprecision.divergence import Generation, generate
from mpq.lowprecision.reduction import chunked_linear
from mpq.lowprecision.reproducibility import (
    Configuration,
    bytes_of,
    compared,
    reproducibility,
    run,
    table_of,
)
from mpq.network.calibration import seeded


class Exact(nn.Module):
    """A causal model of integers, whose sums do not depend on their order."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Linear(8, 8, bias=False)
        self.identity.weight.data = torch.eye(8)
        self.seen = []

    def forward(self, tokens):
        self.seen.append((tuple(tokens.shape), torch.get_num_threads()))
        return self.identity(functional.one_hot((tokens.cumsum(1) + 1) % 8, 8).to(self.identity.weight))


class SummedByBatch(nn.Module):
    """Sums products in as many chunks as the batch has prompts, in the hidden states' dtype."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(8, 256), nn.Linear(256, 256), nn.Linear(256, 8)
        for name, parameter in self.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded(2, name)) / 8

    def forward(self, tokens):
        hidden = self.mix(self.embed(tokens)).cumsum(1)
        return chunked_linear(hidden, self.head.weight.to(hidden.dtype), None, len(tokens))


PROMPTS = torch.randint(1, 8, (5, 6), generator=seeded(0))


def test_configurations_change_batch_padding_and_threads():
    model, threads = Exact(), torch.get_num_threads()
    plain = run(model, PROMPTS, 2, Configuration(batch=2))
    assert model.seen == [((2, 6), 1), ((2, 7), 1), ((2, 6), 1), ((2, 7), 1), ((1, 6), 1), ((1, 7), 1)]
    model.seen.clear()
    other = run(model, PROMPTS, 2, Configuration(batch=5, padding=3, threads=2))
    assert model.seen == [((5, 9), 2), ((5, 10), 2)]
    assert torch.get_num_threads() == threads
    assert np.array_equal(plain.tokens, other.tokens)
    assert np.array_equal(plain.tokens, generate(model, PROMPTS, 2).tokens)
    assert "padding 3, 2 threads" in Configuration(5, 3, 2).name


def test_measures_by_hand():
    def made(tokens, probabilities):
        return Generation(np.array(tokens), np.array(probabilities, dtype=np.float64))

    runs = [made([[1, 2, 3], [4, 4, 4]], [[0.9, 0.5, 0.3], [0.8, 0.8, 0.8]]),
            made([[1, 9, 3], [4, 4, 4]], [[0.8, 0.7, 0.9], [0.8, 0.8, 0.8]])]  # fmt: skip
    found = compared("bfloat16", runs)
    assert (found.divergence, found.first, found.diverged, found.identical) == ((1, None), 1, 0.5, 0.5)
    assert found.largest == pytest.approx(0.2)  # answers diverge after the first difference
    assert found.spread == pytest.approx(((0.1 + 0.2) / 2**0.5 / 2 + 0) / 2)
    assert "50%" in table_of([found])


def test_exact_models_are_identical_and_bfloat16_is_not():
    for found in reproducibility(Exact(), PROMPTS, 3):
        assert (found.identical, found.largest, found.spread, found.first) == (1.0, 0.0, 0.0, None)
    model = SummedByBatch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configurations = (Configuration(), Configuration(batch=3), Configuration(batch=5, padding=2))
    short, cast, whole = reproducibility(model, PROMPTS, 3, configurations=configurations)
    assert short.spread > 1000 * cast.spread > 0
    assert cast.spread == pytest.approx(whole.spread)
    assert cast.identical < 1
    assert short.nbytes == cast.nbytes == whole.nbytes / 2
    assert whole.nbytes == bytes_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_impossible_comparisons_are_refused():
    with pytest.raises(MpqError, match="two or more configurations"):
        reproducibility(Exact(), PROMPTS, 3, configurations=(Configuration(),))
    with pytest.raises(MpqError, match="precision is one of"):
        reproducibility(Exact(), PROMPTS, 3, precisions=("float8",))
