"""Kronecker-factored curvature against Kronecker products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import output_differences, sample_gradients
from small_models import CASES, class_batches, make_task, seed_weights
from torch import nn

import mpq.sensitivity.kronecker as module
from mpq.network.calibration import cross_entropy, samples_in
from mpq.network.layers import output_matrix
from mpq.sensitivity.derivatives import layer_uses
from mpq.sensitivity.kronecker import kronecker


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
@pytest.mark.parametrize("schemes", [("int3-channel", "int4-g32"), ("int3-channel+a:int4-token",)])
def test_the_score_pairs_every_gradient_with_every_change(name, schemes):
    """Sum over all pairs of positions (p, q) of (d_p . e_q)^2 |d_q|^2 / (2 N sum_r |d_r|^2), in each conv group."""
    task = CASES[name](schemes=schemes)
    scores, _ = kronecker(task, labels="data")
    samples = sum(samples_in(batch) for batch in task.batches)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            found = [(change, slope) for _, change, slope in output_differences(task, layer, scheme)]
            changes, slopes = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
            assert scores[i, j] == pytest.approx(0.5 * paired(slopes, changes) / samples, rel=1e-3)


def paired(slopes, changes):
    """Sum over groups and pairs of positions of squared products, each change weighted by its share of |d|^2."""
    squares = slopes.square().sum(-1, keepdim=True)  # (groups, positions, 1)
    shares = squares / squares.sum(-2, keepdim=True)
    return ((slopes @ changes.mT).square() * shares.mT).sum().item()


def test_one_position_and_one_sample_is_the_fisher_form():
    """With a single rank-one gradient d x^T nothing is approximated."""
    task = make_task(seed_weights(nn.Sequential(nn.Linear(4, 3, bias=False))), class_batches((4,), (1,)), cross_entropy)
    scores, errors = kronecker(task, labels="data")
    gradient = sample_gradients(task)[0]
    error = task.weight_error(task.layers[0], task.schemes[0]).flatten().double()
    assert scores[0, 0] == pytest.approx(0.5 * (gradient @ error).item() ** 2, rel=1e-4)
    assert errors[0, 0] == pytest.approx(scores[0, 0])


def test_an_embeddings_tokens_are_counted():
    task = CASES["tied"]()
    scores, _ = kronecker(task, labels="data")
    layer, total, samples = task.layers[0], 0.0, 5
    difference = task.weight_error(layer, task.schemes[0])
    looked_up = [use for index in range(2) for _, uses in layer_uses(task, index) for use in uses["embed"]]
    tokens = torch.cat([use.inputs.flatten() for use in looked_up if isinstance(use.module, nn.Embedding)])
    slopes = torch.cat([use.gradient.flatten(0, 1) for use in looked_up if isinstance(use.module, nn.Embedding)])
    total = paired(slopes, difference[tokens])
    found = [
        (change, output_matrix(use.module, use.gradient))
        for use, change, _ in output_differences(task, layer, task.schemes[0])
        if not isinstance(use.module, nn.Embedding)
    ]
    changes, gradients = (torch.cat(parts) for parts in zip(*found, strict=True))
    total += paired(gradients, changes)
    assert scores[0, 0] == pytest.approx(0.5 * total / samples, rel=1e-3)


def test_very_wide_layers_keep_a_diagonal(monkeypatch):
    whole, _ = kronecker(CASES["mlp"](), labels="data")
    monkeypatch.setattr(module, "WIDEST", 3)
    task = CASES["mlp"]()
    scores, _ = kronecker(task, labels="data")
    assert scores[2, 0] == pytest.approx(whole[2, 0])  # 3 channels: kept whole
    found = [(change, slope) for _, change, slope in output_differences(task, task.layers[0], task.schemes[0])]
    changes, slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
    shares = slopes.square().sum(1, keepdim=True) / slopes.square().sum()
    expected = (slopes.square().sum(0) * (shares * changes.square()).sum(0)).sum().item() / 11
    assert scores[0, 0] == pytest.approx(0.5 * expected, rel=1e-3)


def test_labels_are_the_models_where_the_loss_is_cross_entropy_and_the_datas_elsewhere(caplog):
    task = CASES["mlp"]()
    np.testing.assert_array_equal(kronecker(task)[0], kronecker(task, labels="model")[0])
    other = replace(task, loss_fn=lambda model, batch: model(batch[0]).square().mean())
    np.testing.assert_array_equal(kronecker(other)[0], kronecker(other, labels="data")[0])
    assert "data's own labels" in caplog.text


def test_a_batch_passes_twice_forward_with_labels_of_the_models_own_and_once_back() -> None:
    task = CASES["mlp"]()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    task.model.register_forward_hook(count)
    kronecker(task)
    assert passes == 2 * len(task.batches)  # to find the loss's targets, and for the gradients
