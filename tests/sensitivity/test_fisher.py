"""Per-sample squared gradients against a loop over samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import gauss_newton_matrix, layer_slice, weight_errors
from small_models import CASES as SMALL
from small_models import (
    Convolutions,
    Routed,
    TiedLanguageModel,
    class_batches,
    make_task,
    mlp,
    seed_weights,
    token_batches,
)

from mpq.network.calibration import cross_entropy, next_token_loss, split_batch
from mpq.network.layers import weight_groups, weight_matrix
from mpq.rounding.store import MethodRounder
from mpq.sensitivity import fisher as fisher_file
from mpq.sensitivity.fisher import fisher

CASES = {
    "mlp": lambda: make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy),
    "convolutions": lambda: make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy),
    "tied": lambda: make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss),
    "routed": lambda: make_task(seed_weights(Routed()), class_batches((5, 4), (6, 3)), cross_entropy),
}


def sample_gradients(task):
    """Gradient of every weight matrix for every sample, by autograd, one sample at a time: (samples, rows, cols)."""
    weights = [task.module(layer).weight for layer in task.layers]
    found = []
    for batch in task.batches:
        for sample in split_batch(batch):
            gradients = torch.autograd.grad(task.loss_fn(task.model, sample), weights)
            matrices = []
            for layer, gradient in zip(task.layers, gradients, strict=True):
                turned = gradient.t() if layer.kind == "transformers-conv1d" else gradient
                matrices.append(turned.reshape(layer.rows, layer.cols))
            found.append(matrices)
    return [torch.stack([matrices[i] for matrices in found]).double() for i in range(len(task.layers))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_scores_equal_a_loop_over_samples(name, chunk, monkeypatch):
    monkeypatch.setattr(fisher_file, "CHUNK", chunk)
    task = CASES[name]()
    scores, errors = fisher(task)
    for i, (layer, gradients) in enumerate(zip(task.layers, sample_gradients(task), strict=True)):
        norms = gradients.square().sum((1, 2))
        relative = (norms.std() / np.sqrt(len(norms)) / norms.mean()).item()
        for j, scheme in enumerate(task.schemes):
            difference = task.quantized(layer, scheme) - weight_matrix(task.module(layer)).detach()
            expected = 0.5 * (gradients.square().mean(0) * difference.square()).sum().item()
            assert scores[i, j] == pytest.approx(expected, rel=1e-4)
            assert errors[i, j] == pytest.approx(expected * relative, rel=1e-4)


def test_the_model_keeps_its_gradients_and_their_switches():
    task = CASES["convolutions"]()
    task.model.first.weight.requires_grad_(False)
    task.model.head.weight.grad = torch.ones_like(task.model.head.weight)
    fisher(task)
    assert not task.model.first.weight.requires_grad
    assert task.model.head.weight.requires_grad
    assert torch.equal(task.model.head.weight.grad, torch.ones_like(task.model.head.weight))
    assert task.model.first.weight.grad is None
    assert not task.model.head._forward_hooks


def test_a_layer_the_loss_never_reaches_costs_nothing():
    model = seed_weights(TiedLanguageModel())
    model.idle = torch.nn.Linear(3, 3)
    task = make_task(model, token_batches(), next_token_loss)
    scores, errors = fisher(task)
    assert task.layers[-1].name == "idle"
    assert not scores[-1].any()
    assert not errors[-1].any()


def test_small_models_have_the_expected_groups():
    assert weight_groups(Convolutions().depthwise) == 6


@pytest.mark.parametrize("name", SMALL)
def test_model_labels_estimate_gauss_newtons_diagonal(name):
    """Unbiased over seeds, also where a sample's loss averages over tokens."""
    tasks = [replace(SMALL[name](seed=seed), rounder=MethodRounder("nearest")) for seed in range(150)]
    scores = np.stack([fisher(task, labels="model")[0] for task in tasks])
    diagonal = gauss_newton_matrix(tasks[0]).diagonal()
    for i in range(scores.shape[1]):
        for j in range(scores.shape[2]):
            exact = 0.5 * (diagonal[layer_slice(tasks[0], i)] * weight_errors(tasks[0], i, j).square()).sum().item()
            error = scores[:, i, j].std(ddof=1) / np.sqrt(len(tasks))
            assert abs(scores[:, i, j].mean() - exact) <= 4.5 * error
            assert error < 0.15 * exact
