"""Top eigenvalues against exact Hessians, HAWQ's score and order against their formulas."""

import numpy as np
import pytest
import torch
from exact import exact_blocks, gauss_newton_blocks
from small_models import Convolutions, TiedLanguageModel, class_batches, make_task, mlp, seed_weights, token_batches

from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.sensitivity.eigenvalue import eigenvalue, fine_tuning_order, top_eigenvalues

CASES = {
    "mlp": lambda: make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy),
    "convolutions": lambda: make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy),
    "tied": lambda: make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss),
}
EXACT = {"hessian": exact_blocks, "gauss-newton": gauss_newton_blocks}


def exact_tops(task, operator):
    blocks = EXACT[operator](task)
    return np.array([torch.linalg.eigvalsh(blocks[i][i]).max().item() for i in range(len(blocks))])


@pytest.mark.parametrize("operator", EXACT)
@pytest.mark.parametrize("name", CASES)
def test_top_eigenvalues_are_exact(name, operator):
    task = CASES[name]()
    found = top_eigenvalues(task, operator=operator, max_steps=60, tolerance=1e-3)
    np.testing.assert_allclose(found.values, exact_tops(task, operator), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_default_stops_early_within_its_residual(name):
    task = CASES[name]()
    found, exact = top_eigenvalues(task), exact_tops(task, "hessian")
    assert np.all(np.abs(found.values - exact) <= found.residuals)
    np.testing.assert_allclose(found.values, exact, rtol=0.05)
    assert found.products < 60 * len(task.layers)


def test_small_eigenvalues_are_not_shrunk():
    """A loss a million times smaller has eigenvalues a million times smaller; pyhessian's epsilon would eat them."""

    def faint(model, batch):
        return 1e-6 * cross_entropy(model, batch)

    batches = class_batches((5,), (9,))
    usual = top_eigenvalues(make_task(mlp(), batches, cross_entropy)).values
    np.testing.assert_allclose(top_eigenvalues(make_task(mlp(), batches, faint)).values, 1e-6 * usual, rtol=1e-3)


def test_the_pyhessian_backend_agrees():
    task = CASES["mlp"]()
    theirs = top_eigenvalues(task, backend="pyhessian", max_steps=200, tolerance=1e-5).values
    np.testing.assert_allclose(theirs, exact_tops(task, "hessian"), rtol=0.02)
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_score_is_hawqs_rank_times_half_the_squared_error():
    task = CASES["mlp"]()
    scores, errors = eigenvalue(task)
    found = top_eigenvalues(task)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            squared = task.weight_error(layer, scheme).square().sum().item()
            assert scores[i, j] == pytest.approx(0.5 * found.values[i] / layer.params * squared)
            assert errors[i, j] == pytest.approx(0.5 * found.residuals[i] / layer.params * squared)


def test_the_order_of_tuning_is_by_descending_omega():
    task = CASES["convolutions"]()
    names = tuple(scheme.name for scheme in task.schemes)
    table = SensitivityTable(task.layers, names, *eigenvalue(task), "eigenvalue")
    schemes = {layer.name: names[i % 2] for i, layer in enumerate(task.layers)}
    values = top_eigenvalues(task).values
    omegas = {
        layer.name: values[i] * task.weight_error(layer, task.schemes[i % 2]).square().sum().item()
        for i, layer in enumerate(task.layers)
    }
    assert fine_tuning_order(table, schemes) == tuple(sorted(omegas, key=lambda name: -omegas[name]))
    with pytest.raises(MpqError, match="no scheme of the table"):
        fine_tuning_order(table, {})
    with pytest.raises(MpqError, match="not 'loss'"):
        fine_tuning_order(SensitivityTable(task.layers, names, *eigenvalue(task), "loss"), schemes)


def test_the_first_samples_are_used():
    (inputs, labels), _ = class_batches((5,), (12, 1))
    task = make_task(mlp(), [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])], cross_entropy)
    found = top_eigenvalues(task, samples=10, max_steps=60, tolerance=1e-3).values
    np.testing.assert_allclose(
        found, exact_tops(make_task(mlp(), [(inputs[:10], labels[:10])], cross_entropy), "hessian"), rtol=1e-4
    )


@pytest.mark.parametrize("options", [{"operator": "hesian"}, {"backend": "pihessian"}])
def test_unknown_curvatures_and_backends_are_told(options):
    with pytest.raises(MpqError, match="unknown"):
        eigenvalue(CASES["mlp"](), **options)
