import pytest

from mpq.core.errors import MpqError
from mpq.core.latency import Latency, LatencyTable, load_latencies
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme

TABLE = LatencyTable(
    (
        Latency("int4-g128", 100, 100, 1, 1e-3),
        Latency("int4-g128", 200, 100, 1, 3e-3),
        Latency("int4-g128", 100, 100, 4, 5e-3),
        Latency("int4-g128+a:int8-token", 100, 100, 1, 7e-4),
    ),
    {"threads": 2},
)


def test_measured_shapes_are_as_measured_and_others_lie_between():
    assert TABLE.seconds("int4-g128", 200, 100) == 3e-3
    assert TABLE.seconds("int4-g128+a:int8-token", 100, 100) == 7e-4
    assert TABLE.seconds("int4-g128", 150, 100) == pytest.approx(2e-3)
    assert TABLE.seconds("int4-g128", 50, 100) == pytest.approx(5e-4)
    assert TABLE.seconds("int4-g128", 400, 100) == pytest.approx(6e-3)


def test_a_layer_costs_its_seconds():
    layer = Layer("a", "linear", 100, 100, 10_000)
    assert TABLE.cost(batch=4)(layer, parse_scheme("int4-g128")) == 5e-3


def test_what_was_not_measured_is_an_error():
    with pytest.raises(MpqError, match="int8-channel at batch 1"):
        TABLE.seconds("int8-channel", 100, 100)
    with pytest.raises(MpqError, match="batch 3"):
        TABLE.seconds("int4-g128", 100, 100, 3)


def test_files_give_the_table_back(tmp_path):
    TABLE.save(tmp_path / "latency.json")
    assert load_latencies(tmp_path / "latency.json") == TABLE
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(MpqError, match=name):
            load_latencies(tmp_path / name)
