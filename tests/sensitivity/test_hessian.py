"""Hessian traces against exact Hessians of networks of a few hundred weights, and against pyhessian."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import exact_blocks, exact_input_traces, gauss_newton_blocks
from pyhessian import hessian as PyHessian
from small_models import (
    Convolutions,
    TiedLanguageModel,
    class_batches,
    make_task,
    mlp,
    seed_weights,
    token_batches,
)
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.rounding.reference import fake_quantize
from mpq.sensitivity.gauss_newton import slope_scales, straight_layers
from mpq.sensitivity.hessian import hessian, hessian_traces
from mpq.sensitivity.journal import Journal

RESNET = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "cifar10_resnet20.safetensors"


def variance(blocks, i, scales, others):
    """Of one draw v_i . (H s v)_i / s_i with Rademacher v over layer i and others."""
    own = 2 * (blocks[i][i].square().sum() - blocks[i][i].diagonal().square().sum())
    cross = [(scales[j] / scales[i]) ** 2 * blocks[i][j].square().sum() for j in others if j != i]
    return (own + sum(cross)).item()


CASES = {
    "mlp": lambda: make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy),
    "convolutions": lambda: make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy),
    "tied": lambda: make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss),
}


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_traces_are_unbiased_within_their_standard_errors(name):
    task = CASES[name]()
    blocks = gauss_newton_blocks(task)
    traces = hessian_traces(task, operator="gauss-newton", min_probes=200, max_probes=200)
    exact = np.array([blocks[i][i].trace().item() for i in range(len(blocks))])
    assert np.all(np.abs(traces.means - exact) <= 4 * traces.probe_errors + 2e-4 * np.abs(exact))
    assert np.all(traces.probe_errors < 0.25 * exact.max())


@pytest.mark.parametrize("name", CASES)
def test_traces_of_inputs_are_the_mean_of_each_samples_own(name):
    task = CASES[name]()
    traces = hessian_traces(task, of="inputs", min_probes=300, max_probes=300)
    exact = exact_input_traces(task)
    assert np.all(np.abs(traces.means - exact) <= 4 * traces.probe_errors + 1e-9)
    assert np.all(traces.probe_errors < 0.25 * np.abs(exact).max())


def test_activation_formats_add_the_term_of_the_inputs():
    task = make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy, ("int4-g32", "int4-g32+a:int4-token"))
    scores, _ = hessian(task)
    traces = hessian_traces(task, of="inputs")
    inputs = torch.cat([batch[0] for batch in task.batches])
    difference = fake_quantize(inputs, parse_format("int4-channel")) - inputs  # the first layer's are the model's own
    squared = difference.square().sum().item() / len(inputs)
    expected = 0.5 * max(traces.means[0], traces.errors[0]) / inputs.shape[1] * squared
    assert scores[0, 1] - scores[0, 0] == pytest.approx(expected, rel=1e-4)


def test_the_pyhessian_backend_agrees():
    task = make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy)
    theirs, errors = hessian(task, backend="pyhessian", max_probes=200)
    ours, our_errors = hessian(replace(task, journal=Journal(None, {})), min_probes=200, max_probes=200, target=0)
    blocks = exact_blocks(task)
    positive = np.array([blocks[i][i].trace().item() for i in range(3)]) > 0
    assert positive.any()
    assert np.all(np.abs(theirs - ours)[positive] <= 4 * np.hypot(errors, our_errors)[positive])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in task.model.parameters())


@pytest.mark.parametrize("options", [{"operator": "hesian"}, {"backend": "pihessian"}])
def test_unknown_curvatures_and_backends_are_reported(options):
    with pytest.raises(MpqError, match="unknown"):
        hessian(CASES["mlp"](), **options)


@pytest.mark.parametrize("name", CASES)
def test_traces_are_unbiased_within_their_standard_errors(name):
    task = CASES[name]()
    blocks = exact_blocks(task)
    traces = hessian_traces(task, min_probes=300, max_probes=300)
    exact = np.array([blocks[i][i].trace().item() for i in range(len(blocks))])
    assert np.all(np.abs(traces.means - exact) <= 4 * traces.probe_errors + 2e-4 * np.abs(exact))
    assert np.all(traces.probe_errors < 0.25 * np.abs(exact).max())


def test_the_spread_of_draws_is_the_formulas():
    task = make_task(mlp(), class_batches((5,), (12,)), cross_entropy)
    with torch.no_grad():
        task.model[0].weight.mul_(0.3)  # so that the layers' traces differ
    blocks = exact_blocks(task)
    count = 1500
    traces = hessian_traces(task, min_probes=count, max_probes=count)
    bent = [i for i, straight in enumerate(straight_layers(task)) if not straight]
    assert bent == [0, 1]  # the last layer's outputs are the logits
    scales = slope_scales(replace(task, layers=task.layers[:2]))
    assert scales[0] != pytest.approx(scales[1], rel=0.3)
    for i in bent:
        assert traces.probe_errors[i] ** 2 * count == pytest.approx(variance(blocks, i, scales, bent), rel=0.15)


def test_one_layer_alone_has_hutchinsons_variance():
    """2 (||H||_F^2 - sum of squares of the diagonal), and exactly the trace when the Hessian is diagonal."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh())
    task = make_task(seed_weights(model), class_batches((6,), (9,), 4), cross_entropy)
    traces = hessian_traces(task, min_probes=1500, max_probes=1500)
    assert traces.probe_errors[0] ** 2 * 1500 == pytest.approx(variance(exact_blocks(task), 0, [1], [0]), rel=0.15)

    def diagonal(model, batch):
        return (torch.arange(24.0).view(4, 6) * model[0].weight.square()).sum() / 2

    sure = hessian_traces(make_task(model, class_batches((6,), (9,), 4), diagonal))
    assert sure.means[0] == pytest.approx(sum(range(24)))
    assert sure.probe_errors[0] == pytest.approx(0, abs=1e-4)
    assert sure.probes == 2


def test_traces_agree_with_pyhessian_on_a_small_net():
    task = make_task(mlp(), class_batches((5,), (16,)), cross_entropy)
    traces = hessian_traces(task, min_probes=400, max_probes=400)
    torch.manual_seed(0)
    reference = PyHessian(task.model, functional.cross_entropy, data=task.batches[0], cuda=False)
    draws = reference.trace(maxIter=400, tol=0)
    assert len(draws) == 400
    error = np.hypot(np.std(draws) / 20, np.sqrt((traces.probe_errors**2).sum()) * np.sqrt(3))
    assert abs(traces.means.sum() - np.mean(draws)) <= 4 * error
    assert error < 0.1 * abs(np.mean(draws))


@pytest.mark.slow
@pytest.mark.skipif(not RESNET.exists(), reason="needs the pretrained ResNet-20 in ../shared/data")
def test_traces_agree_with_pyhessian_on_resnet20():
    from experiments.models.reference_models import cifar10_calibration, resnet

    model, (batch,) = resnet(20), cifar10_calibration(32, 32)
    task = make_task(model, [batch], cross_entropy)
    traces = hessian_traces(task, min_probes=12, max_probes=12)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight") and parameter.ndim > 1)
    torch.manual_seed(0)
    draws = PyHessian(model, functional.cross_entropy, data=batch, cuda=False).trace(maxIter=12, tol=0)
    error = np.hypot(np.std(draws) / np.sqrt(12), np.sqrt((traces.probe_errors**2).sum()))
    assert abs(traces.means.sum() - np.mean(draws)) <= 4 * error
    sys.modules.pop("reference_models", None)


def test_the_score_is_half_the_mean_trace_times_the_squared_error():
    task = CASES["mlp"]()
    scores, errors = hessian(task)
    traces = hessian_traces(task)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            squared = task.weight_error(layer, scheme).square().sum().item()
            trace = max(traces.means[i], traces.errors[i])
            assert scores[i, j] == pytest.approx(0.5 * trace / layer.params * squared)
            assert errors[i, j] == pytest.approx(0.5 * traces.errors[i] / layer.params * squared)


def test_negative_curvature_is_raised_to_its_standard_error(caplog):
    def concave(model, batch):
        return -(model(batch[0]).square().mean())

    scores, errors = hessian(make_task(mlp(), class_batches((5,), (7, 4)), concave))
    assert np.all(scores >= errors)
    assert "below their standard error" in caplog.text


def test_more_probes_are_drawn_until_the_target_is_met():
    def probes(target):
        return hessian_traces(CASES["mlp"](), min_probes=2, max_probes=512, target=target).probes

    assert probes(10.0) == 2
    assert 2 < probes(0.3) <= 512
    assert hessian_traces(CASES["mlp"](), min_probes=2, max_probes=5, target=0.0, settle=0.0).probes == 5


def test_probes_do_not_depend_on_the_selected_layers():
    whole = make_task(mlp(), class_batches((5,), (12,)), cross_entropy)
    one = replace(whole, layers=whole.layers[1:2], journal=Journal(None, {}))
    first = hessian_traces(one, min_probes=400, max_probes=400)
    shared = hessian_traces(whole, min_probes=400, max_probes=400)
    assert abs(first.means[0] - shared.means[1]) < 4 * np.hypot(first.probe_errors[0], shared.probe_errors[1])
    assert first.probe_errors[0] < shared.probe_errors[1]  # no cross terms


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            q, v = self.q_proj(x).unsqueeze(1), self.v_proj(x).unsqueeze(1)
            return self.head(functional.scaled_dot_product_attention(q, q, v).squeeze(1).mean(1))

    task = make_task(seed_weights(Attention()), class_batches((6, 4), (8,)), cross_entropy)
    blocks = exact_blocks_with_plain_attention(task)
    traces = hessian_traces(task, min_probes=300, max_probes=300)
    assert np.all(np.abs(traces.means - blocks) <= 4 * traces.probe_errors + 2e-4 * np.abs(blocks))


def exact_blocks_with_plain_attention(task):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        blocks = exact_blocks(task)
    return np.array([blocks[i][i].trace().item() for i in range(len(blocks))])


def test_bad_probe_numbers_are_reported():
    with pytest.raises(MpqError, match="min_probes"):
        hessian_traces(CASES["mlp"](), min_probes=1, max_probes=3)
