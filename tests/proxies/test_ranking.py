"""Rank correlations against scipy's, and bootstrap intervals with their nominal coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.ranking import RATIOS, bootstrap, fitness, interval, partial_spearman, rankings, spearman

numbers = st.integers(0, 6).map(float)  # ties are common


def table(rows: int, seed: int = 0) -> Benchmark:
    random = np.random.default_rng(seed)
    choices = random.integers(0, 2, (rows, 8))
    layers = tuple(Layer(str(i), "linear", 4, 4 + i) for i in range(8))
    quality = choices @ random.random(8) + random.normal(size=rows) * 0.3
    return Benchmark(layers, ("int2-channel", "int4-channel"), choices, -quality, np.full(rows, np.nan))


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs):
    left, right = np.array(pairs).T
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        assert spearman(left, right) == 0
    else:
        assert spearman(left, right) == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)


def test_fixed_size_means_that_size_is_regressed_out():
    random = np.random.default_rng(0)
    size = random.normal(size=80)
    left, right = size + random.normal(size=80), size + random.normal(size=80)
    ranks = [rankdata(values) for values in (left, right, size)]
    residuals = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    assert partial_spearman(left, right, size) == pytest.approx(pearsonr(*residuals).statistic)
    assert partial_spearman(np.exp(size), right, size) == 0
    assert spearman(np.exp(size), right) > 0.4


def test_the_top_is_chosen_by_the_score():
    random = np.random.default_rng(1)
    losses, quality, sizes = random.normal(size=(3, 50))
    found = rankings(losses, quality, sizes)
    for ratio, value in zip(RATIOS, found[:3], strict=True):
        top = sorted(range(50), key=lambda row: losses[row])[: round(ratio * 50)]
        assert value == pytest.approx(spearmanr(-losses[top], quality[top]).statistic)
    assert found[3] == pytest.approx(partial_spearman(-losses, quality, sizes))
    batch = rankings(np.stack([losses, -losses]), quality, sizes)
    assert np.allclose(batch[0], found)
    assert batch[1, 0] == pytest.approx(-found[0])


def test_a_perfect_score_is_one_everywhere():
    benchmark = table(60)
    assert rankings(-benchmark.quality, benchmark.quality, benchmark.sizes.astype(float)) == pytest.approx(np.ones(4))
    assert fitness(-benchmark.quality, benchmark) == pytest.approx(1)


def test_intervals_have_their_nominal_coverage():
    """For 60 benchmarks, 95 % intervals contain the correlation over 20,000 rows in 50 or more: fewer has a probability
    below 0.1 % at nominal coverage."""
    many = table(20000)
    score = -(many.choices @ np.ones(8))
    truth = spearman(-score, many.quality)
    held = 0
    for start in range(60):
        rows = np.arange(start * 100, start * 100 + 100)
        low, high = interval(bootstrap(score[rows].astype(float), many.take(rows), draws=200, seed=start))
        held += bool(low[0] <= truth <= high[0])
    assert held >= 50


def test_proxies_are_compared_on_the_same_rows():
    benchmark = table(40)
    score = -benchmark.quality + np.random.default_rng(0).normal(size=40)
    draws = bootstrap(np.stack([score, 2 * score]), benchmark, draws=50)
    assert draws.shape == (2, 50, 4)
    assert np.array_equal(draws[0], draws[1])
    with pytest.raises(MpqError, match="at least 10"):
        bootstrap(score[:5], benchmark.take(range(5)))
