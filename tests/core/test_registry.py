import importlib.metadata

import pytest

from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.registry import Metric, Registry, Search, Target
from mpq.core.scheme import parse_scheme


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


def test_target_serving_command_and_refusals():
    layer = Layer("a", "linear", 8, 8)
    cache = CacheFormats((Layer("kv", "keys", 1, 64),), ("int8",))
    target = Target(
        "run", "builtins:len", command="serve {folder}", cache_options=lambda cache: f" --kv {cache.names[0]}",
        objection=lambda layer, scheme: "too wide" if scheme.weight.grid.bits > 4 else "",
    )  # fmt: skip
    assert target.serving("out") == "serve out"
    assert target.serving("out", cache) == "serve out --kv int8-token"
    assert Target("none", "builtins:len").serving("out", cache) == ""
    mix, wide, narrow = (parse_scheme(name) for name in ("int2-g64/int4-g64@3", "int8", "int4"))
    assert target.refusal(layer, mix) == "all rows of a layer have one format there"
    assert (target.refusal(layer, wide), target.refusal(layer, narrow)) == ("too wide", "")
    rows = Target("rows", "builtins:len", mixes=True)
    assert (rows.refusal(layer, mix), rows.refusal(layer, wide)) == ("", "")
