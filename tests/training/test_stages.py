"""Fine-tuning stages: the order, the runs, and what computes quantized in each."""

import numpy as np
import pytest
import torch

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.network.layers import find_layers
from mpq.training.fake import FakeQuantization
from mpq.training.stages import fine_tuning_order, quantize_in_stages, stages
from tests.sensitivity.small_models import Convolutions, class_batches, seed_weights

SCHEMES = ("int2-channel", "int8-channel")


def setting():
    model = seed_weights(Convolutions()).eval()
    layers = find_layers(model)  # first, depthwise, line, head
    scores = np.array([[5.0, 0.1], [9.0, 0.2], [1.0, 0.3], [2.0, 0.4]])
    table = SensitivityTable(layers, SCHEMES, scores, np.zeros((4, 2)), "eigenvalue")
    return model, table, Allocation(layers, ("int8-channel", "int2-channel", "int2-channel", "int2-channel"))


def test_layers_that_lose_most_in_their_own_scheme_come_first():
    _, table, allocation = setting()
    assert fine_tuning_order(table, allocation) == ("depthwise", "head", "line", "first")
    with pytest.raises(MpqError, match="no score of first in int4-channel"):
        fine_tuning_order(table, allocation.with_schemes({"first": "int4-channel"}))


def test_runs_are_nearly_equal_and_lose_nothing():
    order = tuple("abcdefg")
    for count in range(1, 8):
        runs = stages(order, count)
        assert sum(runs, ()) == order
        assert len(runs) == count
        assert max(map(len, runs)) - min(map(len, runs)) <= 1
    with pytest.raises(MpqError, match="1 to 7 stages, not 8"):
        stages(order, 8)


def test_each_stage_quantizes_one_run_more():
    model, table, allocation = setting()
    images = class_batches((4, 6, 6))[0][0]
    quantization = FakeQuantization(model, allocation.layers)
    outputs = [model(images)]
    runs = stages(fine_tuning_order(table, allocation), 2)
    for schemes, names in zip(quantize_in_stages(quantization, allocation, runs), (2, 4), strict=True):
        assert len(schemes) == names
        outputs.append(model(images))
    quantization.use(allocation.scheme_of)
    assert torch.equal(model(images), outputs[2])
    assert not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[1], outputs[0])
