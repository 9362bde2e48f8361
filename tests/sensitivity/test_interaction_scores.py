"""Pairs of layers against allocations measured by hand, and against the exact second order."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from exact import gauss_newton_matrix, layer_slice, weight_errors
from small_models import CASES, class_batches, make_task, mlp

from mpq.core.errors import MpqError
from mpq.core.interactions import Interactions
from mpq.network.calibration import cross_entropy, mean_loss
from mpq.network.layers import matrix_to_weight
from mpq.sensitivity.interactions import interactions

SCHEMES = ("int3-channel", "int8-channel")


def found(task, way, schemes=SCHEMES):
    return interactions(task.model, task.batches, task.loss_fn, schemes, way=way, progress=False)


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_measured_pairs_total_the_loss_of_two_layers_at_once(name):
    task = CASES[name](schemes=SCHEMES)
    pairs = found(task, "measured")
    for i, j, a, b in ((0, 1, 0, 0), (0, 2, 1, 0), (1, 2, 0, 0)):
        copy = deepcopy(task.model)
        for layer, choice in ((i, a), (j, b)):
            module = copy.get_submodule(task.layers[layer].name)
            with torch.no_grad():
                rounded = task.quantized(task.layers[layer], task.schemes[choice])
                module.weight.copy_(matrix_to_weight(rounded, module))
        change = mean_loss(copy, task.batches, task.loss_fn) - mean_loss(task.model, task.batches, task.loss_fn)
        total = pairs.losses[i, a] + pairs.losses[j, b] + pairs.pairs[i, a, j, b]
        assert total == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_small_errors_interact_by_gauss_newton(name):
    """With 8 bits the change of the logits is J dw but for a second order of about the errors' size, 1 %."""
    task = CASES[name](schemes=("int8-channel",))
    pairs = found(task, "outputs", ("int8-channel",)).pairs
    matrix = gauss_newton_matrix(task)
    scale = np.abs(pairs).max()
    for i in range(len(task.layers)):
        for j in range(i):
            block = matrix[layer_slice(task, i), layer_slice(task, j)]
            exact = (weight_errors(task, i, 0) @ block @ weight_errors(task, j, 0)).item()
            assert pairs[i, 0, j, 0] == pytest.approx(exact, rel=0.1, abs=0.03 * scale)


def test_both_ways_measure_the_same_single_losses():
    task = CASES["convolutions"](schemes=SCHEMES)
    np.testing.assert_allclose(found(task, "outputs").losses, found(task, "measured").losses, atol=1e-6)


def test_files_and_provenance(tmp_path):
    task = make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy)
    pairs = found(task, "outputs")
    pairs.save(tmp_path / "pairs.npz")
    again = Interactions.load(tmp_path / "pairs.npz")
    assert np.array_equal(again.pairs, pairs.pairs)
    assert again.provenance["way"] == "outputs"
    assert again.provenance["nsamples"] == 11
    assert all(parameter.requires_grad for parameter in task.model.parameters())


def test_unknown_ways_are_reported():
    with pytest.raises(MpqError, match="unknown way 'guess'"):
        found(CASES["mlp"](), "guess")
