"""Products with Hessian and Gauss-Newton against the matrices themselves."""

import logging

import pytest
import torch
from exact import exact_blocks, gauss_newton_blocks, gauss_newton_matrix, hessian_matrix
from small_models import Convolutions, TiedLanguageModel, class_batches, make_task, mlp, seed_weights, token_batches
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.sensitivity.graph import _say_plain
from mpq.sensitivity.products import weight_curvature

CASES = {
    "mlp": lambda: make_task(mlp(), class_batches((5,), (9,)), cross_entropy),
    "convolutions": lambda: make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (5,)), cross_entropy),
    "tied": lambda: make_task(seed_weights(TiedLanguageModel()), token_batches((3,)), next_token_loss),
}
EXACT = {"hessian": (hessian_matrix, exact_blocks), "gauss-newton": (gauss_newton_matrix, gauss_newton_blocks)}


@pytest.mark.parametrize("operator", EXACT)
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_matrix(name, operator):
    task = CASES[name]()
    matrix, blocks = (exact(task) for exact in EXACT[operator])
    generator = torch.Generator().manual_seed(0)
    with weight_curvature(task, 0, operator) as (curvature, owners):
        assert owners == list(range(len(task.layers)))
        vectors = [torch.randn(weight.shape, generator=generator) for weight in curvature.variables]
        flat = torch.cat([vector.flatten() for vector in vectors]).double()
        found = torch.cat([product.flatten() for product in curvature.product(vectors)]).double()
        torch.testing.assert_close(found, matrix @ flat, rtol=1e-3, atol=1e-4 * matrix.norm().item())
        for i, vector in enumerate(vectors):
            expected = blocks[i][i] @ vector.flatten().double()
            alone = curvature.block(i, vector).flatten().double()
            torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-4 * blocks[i][i].norm().item())


def test_gauss_newton_of_cross_entropy_has_no_negative_eigenvalue():
    matrix = gauss_newton_matrix(CASES["mlp"]())
    assert torch.linalg.eigvalsh(matrix).min() > -1e-6 * matrix.norm()
    assert torch.linalg.eigvalsh(hessian_matrix(CASES["mlp"]())).min() < -1e-3 * matrix.norm()


def test_plain_attention_is_reported_once(caplog):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x):
            x = self.mix(x).unsqueeze(1)
            return functional.scaled_dot_product_attention(x, x, x).squeeze(1).mean(1)

    _say_plain.cache_clear()
    task = make_task(seed_weights(Attention()), class_batches((6, 4), (5, 5)), cross_entropy)
    with caplog.at_level(logging.INFO):
        for index in (0, 1):
            with weight_curvature(task, index) as (curvature, _):
                curvature.product([torch.ones(4, 4)])
    assert caplog.text.count("plain operations") == 1


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("derivative for once_only is not implemented")


def test_operations_without_derivatives_are_reported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x):
            return _OnceOnly.apply(self.line(x))

    with (
        pytest.raises(MpqError, match="cannot be differentiated twice"),
        weight_curvature(make_task(Model(), class_batches((4,)), cross_entropy), 0),
    ):
        pass


def test_gauss_newton_wants_the_models_outputs():
    def without_calling(model, batch):
        return model[0](batch[0]).square().mean()

    task = make_task(mlp(), class_batches((5,)), without_calling)
    with (
        pytest.raises(MpqError, match="calls the model"),
        weight_curvature(task, 0, "gauss-newton"),
    ):
        pass
