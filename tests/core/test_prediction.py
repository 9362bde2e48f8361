"""A proxy's score has its own scale and is never called a loss."""

import json
from dataclasses import replace

import pytest
from problems import make_table

from mpq.cli.main import main
from mpq.plots import Point, Prediction, draw_frontier, draw_predictions, draw_table, frontier_facts
from mpq.search import frontier_of


def labels(figure):
    return " ".join(f"{axes.get_xlabel()} {axes.get_ylabel()}" for axes in figure.axes)


@pytest.mark.parametrize(("metric", "loss"), [("proxy:size", False), ("fisher", True)])
def test_a_score_is_printed_as_a_score(metric, loss, tmp_path, capsys):
    table = replace(make_table(1), metric=metric)
    table.save(tmp_path / "table.csv")
    assert main(["allocate", str(tmp_path / "table.csv"), "--bits", "4.5"]) == 0
    said = capsys.readouterr().out
    assert ("predicted loss" in said) == loss
    assert ("score" in said) != loss
    assert main(["allocate", str(tmp_path / "table.csv"), "--bits", "4.5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert ("loss" in facts, "score" in facts) == (loss, not loss)
    assert facts["precision"] == "MPW"
    assert ("loss" in repr(frontier_of(table).at(bits=4.5))) == loss


@pytest.mark.parametrize(("metric", "loss"), [("proxy:size", False), ("fisher", True)])
def test_a_score_is_plotted_as_a_score(metric, loss):
    table = replace(make_table(1), metric=metric)
    facts = frontier_facts({"ours": frontier_of(table)}, points=[Point("measured", 4.0, 0.1, 0.01)])
    assert len(facts.points) == loss  # a measured divergence does not belong on a score's axis
    predictions = [Prediction("a", 3.0, 0.1, 0.01), Prediction("b", 5.0, 0.2, 0.01)]
    for figure in (draw_frontier(facts), draw_table(table)):
        assert ("predicted loss increase" in labels(figure)) == loss
    compared = draw_predictions(predictions, metric)
    assert ("predicted" in labels(compared)) == loss
    dashed = [line for line in compared.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == loss
