import re
from dataclasses import replace

import numpy as np
import pytest
from problems import make_problem, make_table

from mpq.core.errors import MpqError
from mpq.core.frontier import SavedFrontier
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.plots import (
    Prediction,
    draw_frontier,
    draw_layers,
    draw_predictions,
    draw_table,
    frontier_facts,
    layer_facts,
    scheme_colors,
)
from mpq.report import Row, format_words, write_report
from mpq.search.evolution import evolution
from mpq.search.exact import exact


def test_facts_of_a_frontier_are_its_points_and_the_uniform_formats():
    frontier = exact(make_problem(1))
    chosen = frontier.at(bits=5)
    facts = frontier_facts({"exact": frontier, "again": frontier}, {"chosen": chosen})
    assert [curve.name for curve in facts.curves] == ["exact", "again"]
    np.testing.assert_array_equal(facts.curves[0].bits, frontier.bits)
    np.testing.assert_allclose(facts.curves[0].losses, frontier.losses, rtol=1e-12)  # sums in another order
    assert facts.curves[0].band[3] == pytest.approx(2 * frontier.allocation(3).error)
    assert {mark.name: (mark.bits, mark.loss) for mark in facts.uniform} == {
        name: (allocation.bits, allocation.loss) for name, allocation in frontier.uniform()
    }
    assert facts.chosen == (("chosen", chosen.bits, chosen.loss),)


def test_a_long_frontier_is_thinned_but_keeps_its_ends():
    frontier = exact(build_problem(make_table(5, layers=40)))
    (curve,) = frontier_facts({"exact": frontier}).curves
    assert len(curve.bits) <= 1000 < len(frontier)
    assert (curve.bits[0], curve.bits[-1]) == (frontier.bits[0], frontier.bits[-1])


def measured_frontier(error):
    """A frontier with measured losses of 1.5 times the predicted ones."""

    def evaluate(allocation, share):
        return 1.5 * allocation.loss if error is None else (1.5 * allocation.loss, error)

    return evolution(make_problem(1), evaluate=evaluate, trials=16)


@pytest.mark.parametrize("error", [None, 0.01])
def test_a_measured_frontier_is_drawn_as_measured_from_memory_and_from_its_file(error, tmp_path):
    frontier = measured_frontier(error)
    frontier.save(tmp_path / "f.csv")
    saved = SavedFrontier.load(tmp_path / "f.csv")
    for known in (frontier, saved):
        (curve,) = frontier_facts({"f": known}).curves
        np.testing.assert_array_equal(curve.losses, frontier.losses)
        np.testing.assert_allclose(curve.predicted, frontier.losses / 1.5, rtol=1e-12)
        np.testing.assert_allclose(curve.bits, frontier.bits, rtol=1e-12)
        assert curve.band.tolist() == [2 * (error or 0.0)] * len(frontier)
    (axes,) = draw_frontier(frontier_facts({"seen": saved, "exact": exact(make_problem(1))})).axes
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    shown = "seen, measured" if error is None else "seen, measured +- 2 standard errors"
    assert sorted(said) == sorted(
        ["exact, predicted", "one format for all layers, predicted", "seen, predicted", shown]
    )
    assert axes.get_ylabel() == "loss increase, measured or predicted (made)"
    predicted = draw_frontier(frontier_facts({"exact": exact(make_problem(1))})).axes[0]
    assert predicted.get_ylabel() == "predicted loss increase (made)"


def test_a_cut_frontier_file_is_refused(tmp_path):
    path = tmp_path / "f.csv"
    exact(make_problem(1)).save(path)
    assert SavedFrontier.load(path).measured is None
    whole = path.read_text()
    for text in (whole[:-9], "", whole.split("\n")[0], whole.replace("loss", "lost", 1)):
        path.write_text(text)
        with pytest.raises(MpqError, match="not a valid frontier"):
            SavedFrontier.load(path)


def test_facts_of_layers_are_their_formats_and_bits():
    allocation = exact(make_problem(1)).at(bits=5)
    facts = layer_facts(allocation)
    assert facts.schemes == allocation.schemes
    assert np.average(facts.bits, weights=facts.params) == pytest.approx(allocation.bits)


def test_more_bits_are_darker():
    colors = scheme_colors(["int8-channel", "int2-g32", "int4-g32", "int2-g32"])
    assert list(colors) == ["int2-g32", "int4-g32", "int8-channel"]
    brightness = [sum(color[:3]) for color in colors.values()]
    assert brightness == sorted(brightness, reverse=True)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_every_picture_can_be_drawn_with_negative_losses_too(shift, tmp_path):
    table = make_table(3)
    table.scores[:] -= shift * table.scores.mean()
    frontier = exact(build_problem(table))
    allocation = frontier.allocation(len(frontier) // 2)
    predictions = [Prediction("a", 0.1, 0.2 - shift, 0.1), Prediction("b", 0.5, 0.4, float("nan"))]
    facts = frontier_facts({"exact": frontier}, {"chosen": allocation})
    for figure in (
        draw_frontier(facts, "t"),
        draw_layers(layer_facts(allocation)),
        draw_table(table),
        draw_predictions(predictions),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_a_report_is_one_file_with_escaped_text(tmp_path):
    table = make_table(3)
    frontier = exact(build_problem(table))
    write_report(
        tmp_path / "report.html", title="<b>&", table=table, frontier=frontier, allocation=frontier.at(bits=5),
        rows=[Row("<i>", "1", "2", "3", "4", "5", "6", "7", "8", True)], predictions=[Prediction("a", 0.1, 0.2, 0.1)],
    )  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert text.count("<svg") == 4
    assert "<script" not in text
    assert 'src="http' not in text


def test_names_with_dollars_are_not_rendered_as_formulas(tmp_path):
    table = make_table(3)
    odd = ("$\\frac$", "a$b$<i>", "$$")
    layers = tuple(replace(layer, name=name) for layer, name in zip(table.layers, odd, strict=False))
    table = replace(table, layers=layers + table.layers[len(layers) :])
    frontier = exact(build_problem(table))
    write_report(
        tmp_path / "report.html", title=odd[0], table=table, frontier=frontier, allocation=frontier.at(bits=5),
        rows=[], predictions=[Prediction(odd[0], 0.1, 0.2, 0.1)],
    )  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert text.count("a$b$&lt;i&gt;</text>") == 2
    assert "<i>" not in re.sub("<!--.*?-->", "", text)
    draw_frontier(frontier_facts({odd[0]: frontier}, {odd[0]: frontier.at(bits=5)}), odd[0]).draw_without_rendering()


def test_the_report_shows_the_share_of_rows_in_each_format():
    layer = Layer("l", "linear", 8, 256)
    scheme = parse_scheme("int2-g64/int3-g64@2.8")
    assert format_words(layer, scheme) == scheme.name
    words = format_words(layer, scheme.with_assignment("00110011"))
    assert words == "int2-g64/int3-g64@2.8: 50 % int2-g64, 50 % int3-g64 of the rows"
