"""The measured loss against quantizing by hand."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from small_models import Convolutions, TiedLanguageModel, class_batches, make_task, seed_weights, token_batches

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss, samples_in
from mpq.network.layers import matrix_to_weight, weight_matrix
from mpq.rounding import METHODS
from mpq.rounding.reference import dequantize, fake_quantize
from mpq.sensitivity.loss import loss

CASES = {
    "convolutions": lambda **options: make_task(
        seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy, **options
    ),
    "tied": lambda **options: make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss, **options),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_loss_of_a_copy_quantized_by_hand(name):
    task = CASES[name](schemes=("int3-channel", "mxfp4"))
    before = deepcopy(task.model.state_dict())
    scores, errors = loss(task)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            copy = deepcopy(task.model)
            module = copy.get_submodule(layer.name)
            rounded = dequantize(METHODS["mse"](weight_matrix(module).detach(), scheme.weight, None))
            with torch.no_grad():
                module.weight.copy_(matrix_to_weight(rounded, module))
            by_batch = [
                mean_loss(copy, [batch], task.loss_fn) - mean_loss(task.model, [batch], task.loss_fn)
                for batch in task.batches
            ]
            change = mean_loss(copy, task.batches, task.loss_fn) - mean_loss(task.model, task.batches, task.loss_fn)
            assert scores[i, j] == pytest.approx(change, abs=1e-6)
            sizes = np.array([samples_in(batch) for batch in task.batches])
            p = sizes / sizes.sum()
            spread = np.sqrt(2 * (p**2 * (np.array(by_batch) - change) ** 2).sum())
            assert errors[i, j] == pytest.approx(spread, abs=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


def test_activations_are_quantized_on_the_way_in():
    task = CASES["convolutions"](schemes=("fp32+a:int4",))
    scores, _ = loss(task)
    copy = deepcopy(task.model)
    copy.head.register_forward_pre_hook(lambda module, args: (fake_quantize(args[0], parse_format("int4")),))
    change = mean_loss(copy, task.batches, task.loss_fn) - mean_loss(task.model, task.batches, task.loss_fn)
    assert [layer.name for layer in task.layers].index("head") == 3
    assert scores[3, 0] == pytest.approx(change, abs=1e-6)
    assert scores[3, 0] != 0
    assert not task.model.head._forward_pre_hooks


def test_token_activations_of_convolutions_scale_by_position():
    task = CASES["convolutions"](schemes=("fp32+a:int3-token",))
    scores, _ = loss(task)
    copy = deepcopy(task.model)

    def by_position(module, args):
        x = args[0]
        for n in range(x.shape[0]):
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    x[n, :, h, w] = fake_quantize(x[n, :, h, w][None], parse_format("int3-channel"))[0]
        return (x,)

    copy.depthwise.register_forward_pre_hook(by_position)
    change = mean_loss(copy, task.batches, task.loss_fn) - mean_loss(task.model, task.batches, task.loss_fn)
    assert scores[1, 0] == pytest.approx(change, abs=1e-6)


def test_weights_are_restored_after_a_failure():
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch) * (float("nan") if calls == 6 else 1.0)

    task = make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), failing)
    before = deepcopy(task.model.state_dict())
    with pytest.raises(MpqError, match="layer first in int4-g32: the loss of calibration batch 1 is nan"):
        loss(task)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
