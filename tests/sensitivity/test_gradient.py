"""Gradients times changes of outputs against the layers' own outputs and against exact quadratic forms."""

import numpy as np
import pytest
from exact import gauss_newton_matrix, layer_slice, output_differences, sample_gradients, weight_errors
from small_models import CASES, Routed, class_batches, make_task, seed_weights

import mpq.sensitivity.gradient as module
from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, samples_in
from mpq.sensitivity.gradient import gradient, quadratic

SCHEMES = ("int3-channel", "int4-g32", "int4-g32+a:int4-token")


@pytest.mark.parametrize("name", CASES)
def test_squares_are_those_of_outputs_computed_directly(name):
    task = CASES[name](schemes=SCHEMES)
    scores, _ = gradient(task)
    samples = sum(samples_in(batch) for batch in task.batches)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            expected = sum(
                (change * slope).square().sum().item() for _, change, slope in output_differences(task, layer, scheme)
            )
            assert scores[i, j] == pytest.approx(0.5 * expected / samples, rel=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_with_the_datas_labels_the_form_is_of_each_samples_gradient(name):
    task = CASES[name]()
    scores, errors = quadratic(task, labels="data")
    gradients = sample_gradients(task)
    for i in range(len(task.layers)):
        for j in range(len(task.schemes)):
            numbers = (gradients[:, layer_slice(task, i)] @ weight_errors(task, i, j)).square() / 2
            assert scores[i, j] == pytest.approx(numbers.mean().item(), rel=1e-3)
            assert errors[i, j] == pytest.approx(numbers.std().item() / len(numbers) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_with_the_models_labels_the_form_is_gauss_newtons(name):
    """Unbiased over draws; the error bar counts draws and samples, so the draws' own is smaller."""
    task = CASES[name]()
    draws = 300
    scores, errors = quadratic(task, draws=draws)
    matrix = gauss_newton_matrix(task)
    for i in range(len(task.layers)):
        block = matrix[layer_slice(task, i), layer_slice(task, i)]
        for j in range(len(task.schemes)):
            error = weight_errors(task, i, j)
            exact = 0.5 * (error @ block @ error).item()
            assert abs(scores[i, j] - exact) <= 4 * errors[i, j]
            assert errors[i, j] < 0.2 * exact


def test_portions_do_not_matter(monkeypatch):
    whole = gradient(CASES["convolutions"]())
    monkeypatch.setattr(module, "HELD", 1)
    parts = gradient(CASES["convolutions"]())
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)


def test_experts_are_scored_sample_by_sample():
    task = make_task(seed_weights(Routed()), class_batches((5, 4), (6, 3)), cross_entropy)
    scores, _ = quadratic(task, labels="data")
    gradients = sample_gradients(task)
    for i in range(2):
        numbers = (gradients[:, layer_slice(task, i)] @ weight_errors(task, i, 0)).square() / 2
        assert scores[i, 0] == pytest.approx(numbers.mean().item(), rel=1e-3)


def test_unknown_labels_are_reported():
    with pytest.raises(MpqError, match="not 'dta'"):
        gradient(CASES["mlp"](), labels="dta")
