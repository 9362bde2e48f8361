import numpy as np
import pytest
from problems import make_table

import mpq
from mpq.core.errors import MpqError
from mpq.core.latency import Latency, LatencyTable
from mpq.search.budgets import latency_cost
from mpq.search.choice import allocate


def test_the_search_is_chosen_by_the_request():
    table = make_table(1)
    exact = allocate(table, bits=5)
    assert exact.allocation.schemes == exact.frontier.at(bits=5).schemes
    integer = allocate(table, bits=5, budgets={"bitops": 1e12})
    assert integer.allocation.loss == pytest.approx(exact.allocation.loss)
    smallest = allocate(table, loss=exact.allocation.loss * (1 + 1e-9))
    assert smallest.allocation.size <= exact.allocation.size
    assert mpq.allocate is allocate


def test_a_size_is_that_of_the_whole_model():
    table = make_table(1)
    whole = allocate(table, bits=5).allocation.total
    for search in ("exact", "integer"):
        assert allocate(table, size=whole, search=search).allocation.total <= whole
    assert allocate(table, size=f"{whole}B").allocation.total <= whole


def test_incompatible_options_are_reported():
    table = make_table(1)
    for options, message in (
        ({}, "give one budget"),
        ({"bits": 4, "size": 100}, "give one budget"),
        ({"bits": 4, "search": "cheapest"}, "give loss instead"),
        ({"loss": 1, "search": "exact"}, "leave the search out"),
        ({"bits": 4, "whole_frontier": True}, "search on measured loss"),
        ({"bits": 4, "search": "exat"}, "did you mean exact"),
        ({"bits": 4, "budgets": {"activations": 1}}, "needs the model: give live_activations"),
    ):
        with pytest.raises(MpqError, match=message):
            allocate(table, **options)


def test_latencies_are_seconds_of_layers():
    table = make_table(1)
    layer = table.layers[0]
    entries = tuple(Latency(name, layer.rows, layer.cols, 1, 1.0 + i) for i, name in enumerate(table.schemes))
    seconds = latency_cost(table, LatencyTable(entries))
    assert seconds.shape == table.scores.shape
    np.testing.assert_allclose(seconds[0], 1.0 + np.arange(len(table.schemes)))
    limit = float(seconds.sum(0)[0]) * 1.01
    found = allocate(table, bits=16, budgets={"latency": limit}, latencies=LatencyTable(entries))
    assert found.frontier.problem.totals(found.frontier.choices[-1])["latency"] <= limit


def test_reprs_fit_on_a_screen():
    choice = allocate(make_table(1), bits=5)
    assert len(repr(choice.frontier)) < 160
    assert len(repr(choice.allocation)) < 240
    assert "5 layers at" in repr(choice.allocation)
    assert "points" in repr(choice.frontier)
