"""Traces from per-sample gradients against exact matrices; detection of piecewise linear layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import exact_blocks, gauss_newton_blocks
from small_models import CASES, Routed, class_batches, make_task, seed_weights
from torch import nn

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy
from mpq.sensitivity.derivatives import design_row
from mpq.sensitivity.gauss_newton import design_order, gauss_newton_draws, slope_scales, straight_layers
from mpq.sensitivity.hessian import hessian_traces
from mpq.sensitivity.journal import Journal


def relu_net():
    """Convolution, ReLU, pooling: piecewise linear in every layer's weight."""
    parts = (nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3))
    return make_task(seed_weights(nn.Sequential(*parts)), class_batches((2, 6, 6), (5, 4)), cross_entropy)


def exact_traces(blocks):
    return np.array([blocks[i][i].trace().item() for i in range(len(blocks))])


def test_hessians_of_piecewise_linear_layers_equal_gauss_newton_after_a_full_design():
    task = relu_net()
    assert straight_layers(task) == [True] * 3
    assert design_order(task) == 4  # three classes
    traces = hessian_traces(task, min_probes=4, max_probes=100)
    assert traces.probes == 4
    np.testing.assert_allclose(traces.means, exact_traces(exact_blocks(task)), rtol=1e-4)  # float32 sums
    assert np.all(traces.probe_errors == 0)
    assert np.all(traces.errors > 0)  # the batches differ


@pytest.mark.parametrize("name", CASES)
def test_a_full_design_gives_exact_gauss_newton_traces(name):
    """Also where a sample has several predictions, and a weight several uses."""
    task = CASES[name]()
    order = design_order(task)
    draws = np.array([list(gauss_newton_draws(task, order, index, range(order))) for index in range(2)])
    sizes = np.array([len(batch) if name == "tied" else len(batch[0]) for batch in task.batches])
    means = sizes / sizes.sum() @ draws.mean(1)
    np.testing.assert_allclose(means, exact_traces(gauss_newton_blocks(task)), rtol=2e-4)


def test_a_partial_design_is_unbiased_with_an_error_estimate():
    task = relu_net()
    exact = exact_traces(exact_blocks(task))
    seeds = [replace(task, seed=seed, journal=Journal(None, {})) for seed in range(200)]
    runs = [hessian_traces(each, min_probes=3, max_probes=3) for each in seeds]
    means = np.array([run.means for run in runs])
    spread = means.std(0, ddof=1)
    assert np.all(np.abs(means.mean(0) - exact) < 4 * spread / np.sqrt(200))
    said = np.mean([run.probe_errors**2 for run in runs], 0)
    np.testing.assert_allclose(said, spread**2, rtol=0.35)  # a variance from 200 numbers has an error of 10 %


def test_experts_that_see_parts_of_many_samples():
    task = make_task(seed_weights(Routed()), class_batches((3, 4), (6, 5)), cross_entropy)
    assert straight_layers(task) == [True, True]
    traces = hessian_traces(task, min_probes=4, max_probes=4)
    np.testing.assert_allclose(traces.means, exact_traces(exact_blocks(task)), rtol=1e-4)


def test_rows_of_the_design_are_orthogonal_signs():
    rows = torch.stack([design_row(3, row, 16) for row in range(16)])
    assert torch.equal(rows.abs(), torch.ones(16, 16))
    assert torch.equal(rows @ rows.T, 16 * torch.eye(16))


def test_nonlinear_layers_are_distinguished_from_piecewise_linear_ones():
    assert straight_layers(CASES["mlp"]()) == [False, False, True]
    assert straight_layers(CASES["tied"]()) == [False] * 3


def test_scales_follow_the_traces_and_other_losses_have_none():
    task = relu_net()
    scales = np.array(slope_scales(task))
    exact = exact_traces(gauss_newton_blocks(task))
    assert np.all(np.argsort(scales) == np.argsort(-exact))
    other = replace(task, journal=Journal(None, {}), loss_fn=lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(MpqError, match="cross-entropy"):
        design_order(other)
    assert np.isfinite(hessian_traces(other).means).all()  # by Hutchinson's probes
