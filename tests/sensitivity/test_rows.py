"""Formats by row: the cheapest assignment of exactly the given bytes, and the scores of mixes."""

import itertools

import numpy as np
import pytest
import torch

import mpq.sensitivity.rows as module
from mpq.core.assignment import assign
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.mix import mix_of
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.network.calibration import cross_entropy
from mpq.sensitivity.kl_curvature import kl_curvature, kl_curvature_by_rows, row_scores
from mpq.sensitivity.profile import profile
from mpq.sensitivity.rows import ladder, tempered
from tests.sensitivity.small_models import class_batches, make_task, mlp

FORMATS = ("int2-channel", "int3-channel", "int4-channel", "int8-channel")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sizes", [(10, 14, 18), (7, 12, 30, 31), (5, 9)])
def test_the_cheapest_assignment_of_the_bytes(seed, sizes):
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 8))
    costs = np.sort(random.random((rows, len(sizes))) * 10 ** random.uniform(-9, 3, (rows, 1)), 1)[:, ::-1]
    raised = int(random.integers(0, rows + 1))
    low = int(random.integers(0, len(sizes) - 1))
    total = rows * sizes[low] + raised * (sizes[low + 1] - sizes[low])
    places = assign(costs, sizes, total)
    assert np.array(sizes)[places].sum() == total
    everything = itertools.product(range(len(sizes)), repeat=rows)
    best = min(
        sum(costs[row, place] for row, place in enumerate(choice))
        for choice in everything
        if sum(sizes[place] for place in choice) == total
    )
    assert costs[np.arange(rows), places].sum() == pytest.approx(best)


@pytest.mark.parametrize("names", [FORMATS, ("int2-g64", "int4-g32", "int8-channel", "bf16"), ("q4_k", "int6-g128")])
def test_row_assignments_use_exactly_the_bytes(names):
    random = np.random.default_rng(0)
    mix = mix_of([parse_format(name) for name in names], 5.0)
    rows, cols = 3000, 576
    total = mix.nbytes(rows, cols) - mix.assignment_bytes(rows)
    sizes = mix.row_bytes(cols)
    costs = random.lognormal(0, 2, (rows, 1)) * np.exp2(-np.array(sizes) / cols * 16)
    places = assign(costs, sizes, total)
    assert np.array(sizes)[places].sum() == total
    order = random.permutation(rows)
    assert costs[np.arange(rows), places].sum() < costs[np.arange(rows), places[order]].sum()
    assert np.array(sizes)[assign(np.zeros((rows, len(sizes))), sizes, total)].sum() == total


def test_tempering_keeps_sums_and_lifts_rows_without_gradient():
    shares = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert torch.equal(tempered(shares, 1.0), shares)
    found = tempered(shares, 0.5)
    torch.testing.assert_close(found.sum(1), shares.sum(1))
    assert 0 < found[0, 0] < found[0, 1] < found[0, 2] < 3
    assert not found[1].any()


def test_mixes_lie_between_their_formats():
    found = [scheme.name for scheme in ladder([parse_scheme(name) for name in ("int3-g64", "int2-g64", "bf16")])]
    assert found == [f"int2-g64/int3-g64@{bits}" for bits in ("2.5", "2.75", "3")]
    with_activations = ladder([parse_scheme(f"int{bits}-channel+a:int8-token") for bits in (4, 8)])
    assert {scheme.activation.name for scheme in with_activations} == {"int8-channel"}
    assert ladder([parse_scheme("int4-g64"), parse_scheme("nvfp4")]) == ()


@pytest.mark.parametrize("estimate", ["input", "position"])
def test_layers_keep_their_scores_and_mixes_are_sums_over_rows(estimate):
    task, again = (make_task(mlp(), class_batches((5,)), cross_entropy, FORMATS) for _ in range(2))
    mixes = ladder(task.schemes)
    found = kl_curvature_by_rows(task, mixes, estimate=estimate, labels="data")
    whole, _ = kl_curvature(again, estimate=estimate, labels="data")
    np.testing.assert_allclose(found.scores[0][:, : len(FORMATS)], whole)
    rows = row_scores(task, estimate=estimate, labels="data")
    checked = 0
    for i, layer in enumerate(task.layers):
        scores, tempered_scores, _ = rows(layer)
        costs = (tempered_scores * (scores.sum(0) / tempered_scores.sum(0))).numpy()
        for j, mix in enumerate(mixes, len(FORMATS)):
            if not mix.mix.suits(layer.rows, layer.cols):
                assert np.isnan(found.scores[0][i, j])
                continue
            places = mix.mix.with_assignment(found.assignments[layer.name][mix.name]).assigned(layer.rows, layer.cols)
            assert found.scores[0][i, j] == pytest.approx(costs[np.arange(layer.rows), places].sum())
            assert found.scores[0][i, j] >= np.min(costs, 1).sum() - 1e-12
            checked += 1
    assert checked > 10


def test_a_table_of_rows_survives_an_interruption_and_its_file(tmp_path, monkeypatch):
    def run(resume=None):
        return profile(
            mlp(), class_batches((5,)), cross_entropy, FORMATS, metric="kl-curvature", granularity="row",
            progress=False, resume=resume,
        )  # fmt: skip

    calls = []

    def interrupted(costs, sizes, total):
        calls.append(len(costs))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return assign(costs, sizes, total)

    whole = run()
    monkeypatch.setattr(module, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "partial")
    assert len((tmp_path / "partial").read_text().splitlines()) > 1
    assert run(tmp_path / "partial") == whole
    whole.save(tmp_path / "table.csv")
    assert SensitivityTable.load(tmp_path / "table.csv") == whole
    assert whole.provenance["granularity"] == "row"
    assert set(whole.assignments) == {layer.name for layer in whole.layers}


def test_invalid_requests_are_reported():
    for settings, said in (
        ({"granularity": "column"}, "unknown granularity"),
        ({"granularity": "row", "metric": "fisher"}, "kl-curvature"),
    ):
        with pytest.raises(MpqError, match=said):
            profile(mlp(), class_batches((5,)), cross_entropy, FORMATS, progress=False, **settings)
