"""The spectrum against eigenvalues of exact matrices."""

import numpy as np
import pytest
import torch
from exact import gauss_newton_matrix, hessian_matrix
from small_models import Convolutions, class_batches, make_task, mlp, seed_weights

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy
from mpq.sensitivity.spectrum import spectrum

BATCHES = class_batches((5,), (9, 6))
EXACT = {"hessian": hessian_matrix, "gauss-newton": gauss_newton_matrix}


@pytest.mark.parametrize("operator", EXACT)
def test_ends_and_traces_are_the_matrixs(operator):
    exact = torch.linalg.eigvalsh(EXACT[operator](make_task(mlp(), BATCHES, cross_entropy))).numpy()
    found = spectrum(mlp(), BATCHES, cross_entropy, operator=operator, steps=60, runs=20, progress=False)
    assert found.size == 106
    assert found.extremes[1] == pytest.approx(exact.max(), rel=1e-4)
    for function in (lambda x: x, np.square, lambda x: np.exp(-np.square(x))):
        value, error = found.trace(function)
        assert abs(value - function(exact).sum()) <= 4 * error + 1e-4 * abs(function(exact).sum())
        assert error < 0.3 * np.abs(function(exact)).sum()


def test_the_spread_of_runs_is_that_of_normal_vectors():
    """size * u^T H u for u uniform on the sphere has variance 2 (||H||_F^2 - tr(H)^2 / n) n / (n + 2)."""
    matrix = hessian_matrix(make_task(mlp(), BATCHES, cross_entropy))
    runs, n = 400, len(matrix)
    _, error = spectrum(mlp(), BATCHES, cross_entropy, steps=2, runs=runs, progress=False).trace()
    variance = 2 * (matrix.square().sum() - matrix.trace() ** 2 / n).item() * n / (n + 2)
    assert error**2 * runs == pytest.approx(variance, rel=0.25)


def test_the_density_is_one_and_centred_on_the_mean():
    found = spectrum(mlp(), BATCHES, cross_entropy, steps=40, runs=5, progress=False)
    low, high = found.extremes
    values = np.linspace(low - 1, high + 1, 20001)
    density = found.density(values)
    step = values[1] - values[0]
    assert density.sum() * step == pytest.approx(1, abs=1e-3)
    assert (density * values).sum() * step * found.size == pytest.approx(found.trace()[0], rel=1e-2)
    assert found.density(values, width=0.5).max() < density.max()


def test_batch_spectra_reach_further_than_that_of_all_data():
    """Top eigenvalues are convex in the matrix: the mean over batches is at least that of the mean."""
    whole = spectrum(mlp(), BATCHES, cross_entropy, steps=60, progress=False).extremes[1]
    single = [spectrum(mlp(), [batch], cross_entropy, steps=60, progress=False).extremes[1] for batch in BATCHES]
    sizes = np.array([9, 6]) / 15
    assert sizes @ single >= whole


def test_layers_can_be_chosen_and_the_model_is_left_alone():
    model = seed_weights(Convolutions()).train()
    batches = class_batches((4, 6, 6), (6, 5))
    found = spectrum(model, batches, cross_entropy, include="head", steps=30, progress=False)
    blocks = hessian_matrix(make_task(seed_weights(Convolutions()), batches, cross_entropy))
    exact = torch.linalg.eigvalsh(blocks[-12:, -12:]).max().item()
    assert found.size == 12
    assert found.extremes[1] == pytest.approx(exact, rel=1e-4)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "at least one"), ({"operator": "x"}, "unknown")])
def test_bad_requests_are_reported(options, message):
    with pytest.raises(MpqError, match=message):
        spectrum(mlp(), BATCHES, cross_entropy, progress=False, **options)
