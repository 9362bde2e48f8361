import importlib.metadata

import pytest

from mpq.core.errors import MpqError
from mpq.core.registry import Metric, Registry, Search


def twice(value):
    """Double a number.

    With more to say of it.
    """
    return 2 * value


ENTRIES = [
    Metric("length", "builtins:len", "how long", measured=True),
    Metric("power", lambda text: lambda value: value ** int(text), "value ** N", family=True),
]


@pytest.fixture
def metrics():
    return Registry(Metric, "metric", "mpq.tests", ENTRIES)


@pytest.fixture
def plugins(monkeypatch):
    values = {"double": f"{__name__}:twice", "triple": f"{__name__}:TRIPLE", "lost": "nowhere_at_all:thing"}
    points = [importlib.metadata.EntryPoint(name, value, "mpq.tests") for name, value in values.items()]
    monkeypatch.setattr("mpq.core.registry.entry_points", lambda group: points if group == "mpq.tests" else [])


TRIPLE = Metric("triple", lambda value: 3 * value, "thrice", activations=True)


def test_an_entry_imports_its_function_lazily(metrics):
    assert metrics.named("length")([1, 2, 3]) == 3
    assert metrics["length"].measured
    assert metrics.names(measured=True) == ("length",)
    assert metrics.names(measured=False) == ()


def test_a_family_creates_its_members(metrics):
    assert list(metrics) == ["length"]
    assert len(metrics) == 1
    assert metrics.named("power:3")(2) == 8
    with pytest.raises(MpqError, match="unknown metric 'power'"):
        metrics.named("power")


def test_plugins_are_functions_or_entries(metrics, plugins):
    assert metrics.named("double")(4) == 8
    assert metrics.named("double").doc == "Double a number."
    assert metrics.named("triple").activations
    with pytest.raises(MpqError, match=r"plugin lost .* cannot be imported"):
        metrics.named("lost")
    with pytest.raises(MpqError, match="unknown metric 'doubel': did you mean double"):
        metrics.named("doubel")


def test_tables_name_every_entry(metrics):
    assert metrics.markdown().splitlines()[2:] == ["| `length` | how long |", "| `power:...` | value ** N |"]
    assert metrics.help() == "  length  how long\n  power   value ** N"
    assert Registry(Search, "search", "mpq.tests", []).names() == ()


def test_a_former_name_is_understood_and_reported():
    from mpq.search import SEARCHES

    with pytest.warns(UserWarning, match="search 'quadratic' is 'pairwise' now"):
        assert SEARCHES.named("quadratic").name == "pairwise"
    assert "quadratic" not in SEARCHES
