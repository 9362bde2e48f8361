from importlib.resources import files

import pytest
import torch

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.models import BUNDLED, bundled
from mpq.network.layers import find_layers
from mpq.quantized import simulate


def uniform(model, name):
    layers = find_layers(model)
    return simulate(model, Allocation(layers, (name,) * len(layers)), "nearest", trainable=False)


def test_the_language_model_reads_and_loses_at_few_bits():
    task = bundled("tiny-lm")
    trained = task.quality().value
    assert trained < 35  # chance is 1024, the frequencies of single tokens give about 350
    four, two = (task.quality(uniform(task.model, name)).value for name in ("int4-g128", "int2-g128"))
    assert trained < four < 2 * trained
    assert two > 2 * trained


def test_the_classifier_reads_and_loses_at_few_bits():
    task = bundled("tiny-cnn")
    trained = task.quality().value
    assert trained > 0.98
    assert task.quality(uniform(task.model, "int8-channel")).value > trained - 0.005
    assert task.quality(uniform(task.model, "int2-channel")).value < 0.8


def test_calibration_is_drawn_by_the_seed_and_evaluation_is_all_there_is():
    first, again, other = (bundled("tiny-lm", nsamples=5, seqlen=64, batch_size=2, seed=seed) for seed in (1, 1, 2))
    assert [len(batch) for batch in first.calibration] == [2, 2, 1]
    assert torch.equal(torch.cat(first.calibration), torch.cat(again.calibration))
    assert not torch.equal(torch.cat(first.calibration), torch.cat(other.calibration))
    assert torch.equal(torch.cat(first.evaluation), torch.cat(other.evaluation))


def test_no_digit_is_in_both_parts():
    task = bundled("tiny-cnn", nsamples=5000)
    seen, unseen = (torch.cat([inputs for inputs, _ in part]) for part in (task.calibration, task.evaluation))
    assert len(seen) == 1297
    assert len(unseen) == 500
    assert not {tuple(row) for row in seen.flatten(1).tolist()} & {tuple(row) for row in unseen.flatten(1).tolist()}


def test_all_of_it_is_small():
    size = sum(file.stat().st_size for file in files("mpq.models").iterdir() if file.is_file())
    assert size < 8e6


@pytest.mark.parametrize("name", BUNDLED)
def test_parameters(name):
    model = bundled(name, nsamples=1, seqlen=16).model
    count = sum(parameter.numel() for parameter in model.parameters())
    assert {"tiny-lm": 1e6 < count < 3e6, "tiny-cnn": count < 2e5}[name]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_unknown_names():
    with pytest.raises(MpqError, match="did you mean tiny-lm"):
        bundled("tiny-ml")
