"""The smallest model within a measured divergence: search over the frontier, limit, refusals."""

import numpy as np
import pytest

import mpq
from mpq.acceptance import accept
from mpq.core.errors import MpqError
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.measuring import Measurer
from mpq.network.layers import find_layers
from mpq.rounding.store import RoundingStore
from mpq.search.exact import exact
from mpq.smallest import CLOSE, _first_within, smallest, within_limit
from mpq.sources import open_source

FORMATS = ("int2-channel", "int3-channel", "int4-channel", "int8-channel")


@pytest.fixture(scope="module")
def source():
    return open_source("tiny-cnn", nsamples=64)


@pytest.fixture(scope="module")
def frontier(source):
    layers = find_layers(source.model)
    scores = np.array([layer.params for layer in layers])[:, None] * 4.0 ** -np.array([2, 3, 4, 8])
    return exact(build_problem(SensitivityTable(layers, FORMATS, scores, 0 * scores, "made")))


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_the_search_finds_what_measuring_every_point_finds(frontier, factor):
    truth = factor * frontier.losses**1.3
    asked = set()

    def divergence(index):
        asked.add(index)
        return float(truth[index])

    for limit in np.geomspace(truth[-1] * 1.01, truth[0], 7):
        first = int(np.flatnonzero(truth <= limit)[0])
        asked.clear()
        found = _first_within(frontier, limit, divergence)
        assert truth[found] <= limit
        assert frontier.costs[found] <= (1 + CLOSE) * frontier.costs[first] or len(asked) > 12
        assert len(asked) <= 13
    assert _first_within(frontier, truth[-1] / 2, divergence) is None


def test_the_limit_is_kept_and_fewer_bytes_would_break_it(source, frontier):
    measurer = Measurer(source, RoundingStore("nearest"))
    limit = 0.02

    def finish(size):
        return accept(frontier, size, measurer, effort="fast")

    found = smallest(frontier, limit, measurer, finish)
    assert found.chosen.harm() <= limit
    smaller = finish(0.9 * found.chosen.allocation.size)
    assert smaller.chosen.harm() > limit


def test_impossible_requests_are_refused(source, frontier, tmp_path):
    measurer = Measurer(source, RoundingStore("nearest"))
    with pytest.raises(MpqError, match=r"largest allocation .* above the limit of 1e-12"):
        smallest(frontier, 1e-12, measurer, lambda size: accept(frontier, size, measurer, effort="fast"))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MpqError, match="expected a number above 0"):
            mpq.quantize(source, tmp_path, max_kl=limit)


def test_a_job_keeps_its_limit_and_reports_held_out_data(source, tmp_path):
    outcome = mpq.quantize(
        source, tmp_path, max_kl=0.05, formats=FORMATS, effort="fast", metric="fisher", progress=False
    )
    assert outcome.accepted.chosen.harm() <= 0.05
    assert outcome.words()[0].startswith("The smallest model found with a KL divergence of at most 0.05")
    assert "above it: ask for about 0.04 to keep it" in within_limit(0.05, 0.048, 0.06)
    assert "within the limit too" in within_limit(0.05, 0.048, 0.049)
