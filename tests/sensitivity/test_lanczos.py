"""Lanczos against eigendecompositions of the matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.sensitivity.lanczos import Lanczos


def run(matrix, start, steps):
    lanczos = Lanczos(start)
    for _ in range(steps):
        if lanczos.exhausted:
            break
        lanczos.take(matrix @ lanczos.direction)
    return lanczos


def symmetric(size, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.T, torch.randn(size, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 30), seed=st.integers(0, 1000))
def test_all_steps_give_all_eigenvalues(size, seed):
    matrix, start = symmetric(size, seed)
    lanczos = run(matrix, start, size)
    values, weights, residuals = lanczos.ritz()
    exact, vectors = np.linalg.eigh(matrix.numpy())
    np.testing.assert_allclose(values, exact, atol=1e-8 * np.abs(exact).max())
    shares = (vectors.T @ (start / start.norm()).numpy()) ** 2
    np.testing.assert_allclose(weights, shares, atol=1e-6)
    assert lanczos.exhausted
    assert residuals.max() <= 1e-6 * np.abs(exact).max()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(3, 40), steps=st.integers(1, 12), seed=st.integers(0, 1000))
def test_an_eigenvalue_lies_within_the_residual(size, steps, seed):
    matrix, start = symmetric(size, seed)
    values, weights, residuals = run(matrix, start, steps).ritz()
    exact = np.linalg.eigvalsh(matrix.numpy())
    for value, residual in zip(values, residuals, strict=True):
        assert np.abs(exact - value).min() <= residual + 1e-8 * np.abs(exact).max()
    assert weights.sum() == pytest.approx(1)


def test_the_basis_stays_orthogonal_in_float32():
    """The top eigenvalue converges first: without the second pass, copies of it would appear."""
    diagonal = torch.cat([torch.linspace(0, 1, 300), torch.tensor([100.0])])
    start = torch.ones(301)
    lanczos = run(torch.diag(diagonal), start, 60)
    basis = torch.stack(lanczos.basis)
    assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-5
    values, _, _ = lanczos.ritz()
    assert (values > 50).sum() == 1


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_nothing_depends_on_the_operators_scale(scale):
    matrix, start = symmetric(20, 3)
    values, weights, _ = run(matrix * scale, start, 8).ritz()
    expected, shares, _ = run(matrix, start, 8).ritz()
    np.testing.assert_allclose(values, expected * scale, rtol=1e-9)
    np.testing.assert_allclose(weights, shares, rtol=1e-9)


def test_a_zero_operator_is_exhausted_at_once():
    lanczos = run(torch.zeros(5, 5), torch.ones(5), 5)
    assert lanczos.exhausted
    assert lanczos.ritz()[0].tolist() == [0.0]
