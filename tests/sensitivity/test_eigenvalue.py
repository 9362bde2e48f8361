"""Top eigenvalues against exact Hessians, HAWQ's score and order against their formulas."""

import numpy as np
import pytest
import torch
from exact import exact_blocks, gauss_newton_blocks
from small_models import Convolutions, TiedLanguageModel, class_batches, make_task, mlp, seed_weights, token_batches
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.network.layers import find_layers
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
    schemes = tuple(task.schemes[i % 2].name for i in range(len(task.layers)))
    found = fine_tuning_order(task.model, Allocation(task.layers, schemes), task.batches, task.loss_fn)
    exact = exact_tops(task, "hessian")
    omegas = {
        layer.name: exact[i] * task.weight_error(layer, task.schemes[i % 2]).square().sum().item()
        for i, layer in enumerate(task.layers)
    }
    assert found == tuple(sorted(omegas, key=lambda name: -omegas[name]))


class Apart(nn.Module):
    """Layers side by side; the loss below has curvature a_k * E[x x'] in every row of layer k."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.middle = (nn.Linear(cols, rows, bias=False) for cols, rows in SIZES)

    def forward(self, inputs):
        return [layer(x) for layer, x in zip((self.wide, self.narrow, self.middle), inputs, strict=True)]


SIZES = ((16, 12), (4, 3), (8, 8))


def test_the_order_is_that_of_eigenvalue_times_squared_error_and_of_nothing_else():
    """Known eigenvalues 1.0, 3.0 and 2.5; squared errors chosen so that every other product has another order."""
    model, curvatures = Apart(), (1.0, 3.0, 2.5)
    inputs = tuple(torch.eye(16).repeat(1, -(-cols // 16))[:, :cols] * 4 for cols, _ in SIZES)  # 16 samples: E[xx'] = I

    def loss(model, batch):
        outputs = model(batch)
        return sum(0.5 * a * out.square().sum() for a, out in zip(curvatures, outputs, strict=True)) / len(batch[0])

    with torch.no_grad():
        for layer, error in zip((model.wide, model.narrow, model.middle), (10.0, 1.0, 3.0), strict=True):
            weight = torch.full_like(layer.weight, 0.5)  # int2's steps of one: half a step away from the grid
            weight[:, 0] = -2.0
            squared = 0.25 * (weight.numel() - len(weight))
            layer.weight.copy_(weight * (error / squared) ** 0.5)
    layers = find_layers(model)
    allocation = Allocation(layers, ("int2-channel-sfp32",) * 3)
    assert exact_tops(make_task(model, [inputs], loss), "hessian") == pytest.approx(curvatures, rel=1e-4)
    order = fine_tuning_order(model, allocation, [inputs], loss, "nearest")
    assert order == ("wide", "middle", "narrow")  # 10.0, 7.5, 3.0; by lambda / n * error: narrow, middle, wide
    by_rank = [a * e / layer.params for a, e, layer in zip(curvatures, (10.0, 1.0, 3.0), layers, strict=True)]
    assert np.argsort(by_rank)[::-1].tolist() == [1, 2, 0]


def test_the_first_samples_are_used():
    (inputs, labels), _ = class_batches((5,), (12, 1))
    task = make_task(mlp(), [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])], cross_entropy)
    found = top_eigenvalues(task, samples=10, max_steps=60, tolerance=1e-3).values
    np.testing.assert_allclose(
        found, exact_tops(make_task(mlp(), [(inputs[:10], labels[:10])], cross_entropy), "hessian"), rtol=1e-4
    )


@pytest.mark.parametrize("options", [{"operator": "hesian"}, {"backend": "pihessian"}])
def test_unknown_curvatures_and_backends_are_reported(options):
    with pytest.raises(MpqError, match="unknown"):
        eigenvalue(CASES["mlp"](), **options)
