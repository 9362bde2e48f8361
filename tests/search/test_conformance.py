"""Every registered search passes the conformance suite; a broken search fails it."""

from dataclasses import replace

import numpy as np
import pytest

from mpq.core.errors import MpqError
from mpq.core.interactions import Interactions
from mpq.search import SEARCHES, search_named
from mpq.search.exact import exact
from mpq.testing.search import SCHEMES, SearchConformance


class TestExact(SearchConformance):
    search = staticmethod(search_named("exact"))
    optimal = True


class TestInteger(SearchConformance):
    search = staticmethod(search_named("integer"))
    optimal = True


class TestCheapest(SearchConformance):
    """Any quality: the smallest allocation within the budgets."""

    search = staticmethod(search_named("cheapest"))
    options = {"loss": 1e9}


class TestMonotone(SearchConformance):
    """With the pinned layer most sensitive, and the one that cannot take bf16 last."""

    search = staticmethod(search_named("monotone"))
    options = {"sensitivities": [2.0, 3.0, 1.0, 2.5]}


class TestQuadratic(SearchConformance):
    search = staticmethod(search_named("pairwise"))
    options = {
        "interactions": Interactions(
            tuple(f"layer{i}" for i in range(5)), SCHEMES, np.ones((5, 4)) * [4, 3, 2, 1], np.zeros((5, 4, 5, 4))
        )
    }


class TestEvolution(SearchConformance):
    search = staticmethod(search_named("evolution"))
    options = {"evaluate": lambda allocation, share: allocation.loss, "trials": 12}


def test_every_search_is_here():
    assert set(SEARCHES) == {"exact", "integer", "cheapest", "monotone", "pairwise", "evolution"}
    with pytest.raises(MpqError, match="unknown search 'exakt': did you mean exact"):
        search_named("exakt")


@pytest.mark.parametrize("defect", ["budget", "tie", "silent"])
def test_a_broken_search_is_caught(defect):
    def broken(problem):
        if defect == "budget" or (defect == "silent" and problem.budgets["size"] == 1):
            return exact(replace(problem, budgets={}))
        frontier = exact(problem)
        if defect == "tie":
            return replace(frontier, costs=frontier.costs - 1)
        return frontier

    class Suite(SearchConformance):
        search = staticmethod(broken)

    with pytest.raises(AssertionError):
        run_all(Suite())


def run_all(suite):
    for name in dir(suite):
        if name.startswith("test_"):
            getattr(suite, name)()


def test_the_one_shot_search_is_found_where_training_loops_look_for_it():
    import mpq.search
    from mpq.search.one_shot import OneShot

    assert mpq.search.OneShot is OneShot
    with pytest.raises(AttributeError, match="no attribute 'TwoShot'"):
        _ = mpq.search.TwoShot
