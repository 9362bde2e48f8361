"""Shrinkage of noisy scores towards neighbours."""

import numpy as np

from mpq.core.layer import Layer
from mpq.sensitivity.shrinkage import shrunk

LAYERS = tuple(Layer(f"blocks.{depth}.up", "linear", 8, 4) for depth in range(30))


def test_noisy_scores_are_shrunk_and_exact_ones_kept():
    """Of a smooth profile with noise of a half the shrunk scores are nearer to the truth; small noise hardly moves."""
    truth = np.exp(np.linspace(0, 1, 30))[:, None]
    noise = np.random.default_rng(0).normal(size=(30, 1))
    for relative, factor in ((0.5, 0.75), (1e-3, None)):
        scores = truth * np.exp(relative * noise)
        drawn, errors = shrunk(LAYERS, scores, relative * scores)
        if factor is None:
            np.testing.assert_allclose(drawn, scores, rtol=5e-3)
        else:
            assert np.abs(np.log(drawn / truth)).mean() < factor * np.abs(np.log(scores / truth)).mean()
            assert (errors / drawn < relative).all()


def test_true_differences_are_kept():
    scores = np.exp(np.random.default_rng(1).normal(size=(30, 1)) * 3)
    drawn, _ = shrunk(LAYERS, scores, 0.1 * scores)
    np.testing.assert_allclose(np.log(drawn), np.log(scores), atol=0.02)


def test_other_shapes_names_and_scores_of_zero_are_no_neighbours():
    others = (Layer("head", "linear", 8, 4), Layer("stem", "linear", 8, 4), Layer("blocks.30.up", "linear", 9, 4))
    scores = np.ones((33, 2))
    scores[5, 1] = 0.0
    scores[30:] = 7.0
    drawn, _ = shrunk(LAYERS + others, scores, 0.5 * scores)
    np.testing.assert_allclose(drawn, scores)
