"""Divergence and wrong predictions against copies of the model quantized by hand."""

from copy import deepcopy

import pytest
import torch
from small_models import CASES

from mpq.network.calibration import samples_in
from mpq.network.layers import matrix_to_weight
from mpq.sensitivity.predicted import divergence, wrong


def quantized_copies(task):
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            copy = deepcopy(task.model)
            with torch.no_grad():
                module = copy.get_submodule(layer.name)
                module.weight.copy_(matrix_to_weight(task.quantized(layer, scheme), module))
            yield i, j, copy


def outputs(model, batch):
    """Logits of the predictions that count, and their targets."""
    with torch.no_grad():
        if isinstance(batch, torch.Tensor):
            return model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        return model(batch[0]), batch[1]


@pytest.mark.parametrize("name", CASES)
def test_divergence_is_the_mean_kl(name):
    task = CASES[name](schemes=("int2-channel", "int4-g32"))
    scores, errors = divergence(task)
    total = sum(samples_in(batch) for batch in task.batches)
    for i, j, copy in quantized_copies(task):
        expected = 0.0
        for batch in task.batches:
            before, after = (outputs(model, batch)[0].double().log_softmax(-1) for model in (task.model, copy))
            kl = (before.exp() * (before - after)).sum(-1).mean().item()
            expected += kl * samples_in(batch) / total
        assert scores[i, j] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (scores >= -1e-7).all()
    assert (errors > 0).any()


@pytest.mark.parametrize("name", CASES)
def test_wrong_predictions_are_counted(name):
    task = CASES[name](schemes=("int2-channel", "int4-g32"))
    scores, _ = wrong(task)
    total = sum(samples_in(batch) for batch in task.batches)

    def share(model, batch):
        logits, targets = outputs(model, batch)
        return (logits.argmax(-1) != targets).double().mean().item()

    for i, j, copy in quantized_copies(task):
        expected = sum(
            (share(copy, batch) - share(task.model, batch)) * samples_in(batch) / total for batch in task.batches
        )
        assert scores[i, j] == pytest.approx(expected, abs=1e-4)
    assert (scores != 0).any()
