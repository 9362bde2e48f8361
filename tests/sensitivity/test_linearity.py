"""Slopes under noise against losses whose slopes are known."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from small_models import CASES, class_batches, make_task, mlp

from mpq.core.errors import MpqError
from mpq.sensitivity.linearity import linearity


def test_a_quadratic_losss_rise_is_exact():
    """L = 3/2 ||W - C||^2: the mean of +E and -E takes away the slope at W, and the rise is 3/2 ||dW||^2."""

    def bowl(model, batch):
        return batch[0].square().mean() * 0 + 1.5 * (model[0].weight - 0.3).square().sum()

    task = make_task(mlp(), class_batches((5,), (4, 4)), bowl)
    scores, errors = linearity(task)
    for j, scheme in enumerate(task.schemes):
        squared = task.weight_error(task.layers[0], scheme).square().sum().item()
        assert scores[0, j] == pytest.approx(1.5 * squared, rel=1e-3)
    assert np.abs(scores[1:]).max() < 1e-4 * scores[0].min()
    assert errors[0].max() < 1e-3 * scores[0].min()


def test_the_model_is_left_alone_and_the_seed_decides():
    task = CASES["convolutions"]()
    before = deepcopy(task.model.state_dict())
    first, errors = linearity(task)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert np.array_equal(first, linearity(CASES["convolutions"]())[0])
    assert not np.array_equal(first, linearity(CASES["convolutions"](seed=1))[0])
    assert (first >= errors).all()


@pytest.mark.parametrize("options", [{"noise": 0}, {"draws": 0}])
def test_bad_noise_is_reported(options):
    with pytest.raises(MpqError, match="options of linearity"):
        linearity(CASES["mlp"](), **options)
