"""Layers without evidence: their reasons in a table, and their imputed scores in a problem."""

import numpy as np
import pytest

from mpq.core.errors import MpqError
from mpq.core.evidence import ASSUMED
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.search import frontier_of

SCHEMES = ("int2-channel", "int4-channel")
NAN = [np.nan, np.nan]


def table(scores, kinds=None, reasons=None):
    kinds = kinds or ["linear"] * len(scores)
    layers = tuple(Layer(f"l{i}", kind, 8, 8 * (i + 1)) for i, kind in enumerate(kinds))
    errors = np.where(np.isnan(scores), np.nan, 0.0)
    return SensitivityTable(layers, SCHEMES, np.array(scores), errors, "x", {}, reasons or {})


def test_reasons_survive_saving_and_loading(tmp_path):
    one = table([[4.0, 1.0], NAN], reasons={"l1": 'nothing, "at all"'})
    one.save(tmp_path / "table.csv")
    found = SensitivityTable.load(tmp_path / "table.csv")
    assert found == one
    assert found.reasons == {"l1": 'nothing, "at all"'}
    assert found != table([[4.0, 1.0], NAN])


def test_reasons_require_a_layer_without_scores():
    with pytest.raises(MpqError, match="names l0: expected a layer whose scores are all NaN"):
        table([[4.0, 1.0], NAN], reasons={"l0": "why"})


def test_unscored_layers_count_as_the_median_of_their_kind_scaled_by_size():
    scores = [[1.0, 0.1], [6.0, 0.2], [9.0, np.nan], NAN, [1000.0, 1000.0]]
    problem = build_problem(
        table(scores, ["linear"] * 4 + ["embedding"], {"l3": "no sample reaches it"}), budgets={"size": "1kB"}
    )
    assert problem.losses[3].tolist() == pytest.approx([3.0 * 4, 0.1 * 4])  # a layer of 4 times the first one's size
    assert problem.variances[3].tolist() == pytest.approx([144.0, 0.16])
    assert problem.losses[2, 1] == np.inf  # no reason: the scheme is impossible for the layer
    assert problem.allocation([0] * 5).provenance[ASSUMED] == {"l3": "no sample reaches it"}


def test_unscored_layers_without_a_scored_peer_are_refused():
    alone = table([NAN, [2.0, 1.0]], ["embedding", "linear"], {"l0": "no sample reaches it"})
    with pytest.raises(MpqError, match=r"layer l0 has no score \(no sample reaches it\)"):
        frontier_of(alone)
    pinned = frontier_of(alone, pin={"l0": "int4-channel"})
    assert pinned.allocation(0).schemes == ("int4-channel", "int2-channel")


def test_unscored_layers_do_not_get_the_fewest_bits():
    """A layer of score 0 would always get them."""
    frontier = frontier_of(table([[4.0, 3.9], NAN, [8.0, 0.1]], reasons={"l1": "why"}))
    chosen = {allocation.schemes for allocation in frontier}
    assert ("int2-channel", "int4-channel", "int4-channel") in chosen


def test_unscored_layers_get_no_mix_of_rows():
    layers = (Layer("a", "linear", 8, 64), Layer("b", "linear", 8, 64))
    schemes = ("int2-g32", "int4-g32", "int2-g32/int4-g32@3.75")
    scores = np.array([[4.0, 1.0, 2.0], [np.nan] * 3])
    found = SensitivityTable(
        layers, schemes, scores, scores * 0, "x", {}, {"b": "no gradient"}, {"a": {schemes[2]: "00001111"}}
    )
    problem = build_problem(found)
    assert problem.losses[1].tolist() == [4.0, 1.0, np.inf]
    for choice in frontier_of(found).choices:
        assert problem.schemes[choice[1]] != schemes[2]
