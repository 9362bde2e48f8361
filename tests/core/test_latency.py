from dataclasses import replace

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


def test_latencies_interpolate_between_measured_shapes():
    assert TABLE.seconds("int4-g128", 200, 100) == 3e-3
    assert TABLE.seconds("int4-g128+a:int8-token", 100, 100) == 7e-4
    assert TABLE.seconds("int4-g128", 150, 100) == pytest.approx(2e-3)
    assert TABLE.seconds("int4-g128", 50, 100) == pytest.approx(5e-4)
    assert TABLE.seconds("int4-g128", 400, 100) == pytest.approx(6e-3)


def test_a_layer_costs_its_seconds():
    layer = Layer("a", "linear", 100, 100, 10_000)
    assert TABLE.cost(batch=4)(layer, parse_scheme("int4-g128")) == 5e-3


def test_unmeasured_formats_and_batches_are_errors():
    with pytest.raises(MpqError, match="int8-channel at batch 1"):
        TABLE.seconds("int8-channel", 100, 100)
    with pytest.raises(MpqError, match="batch 3"):
        TABLE.seconds("int4-g128", 100, 100, 3)


def test_a_mixs_latency_interpolates_its_formats_with_the_measured_overhead():
    """4.5 bits lie half-way between 4 and 5 (and an eighth of a scale); the measured mix took 1.2 times that."""
    times = {"int4-g128": 1e-3, "int5-g128": 2e-3, "int6-g128": 3e-3, "int4-g128/int5-g128@4.625": 1.8e-3}
    table = LatencyTable(tuple(Latency(name, 128, 128, 1, seconds) for name, seconds in times.items()))
    assert table.has_mixes
    assert table.seconds("int4-g128/int5-g128@4.625", 128, 128) == 1.8e-3
    assert table.seconds("int4-g128/int6-g128@5.125", 128, 128) == pytest.approx(1.2 * 2e-3)
    assert table.seconds("int4-g128/int6-g128@5.125", 256, 128) == pytest.approx(1.2 * 4e-3)
    with pytest.raises(MpqError, match="int3-g128 at batch 1"):
        table.seconds("int3-g128/int6-g128@5", 128, 128)
    plain = LatencyTable(table.entries[:3])
    assert not plain.has_mixes
    with pytest.raises(MpqError, match=r"int4-g128/int5-g128@4\.5 at batch 1"):
        plain.seconds("int4-g128/int5-g128@4.5", 128, 128)


def test_latency_tables_survive_saving_and_loading(tmp_path):
    TABLE.save(tmp_path / "latency.json")
    assert load_latencies(tmp_path / "latency.json") == TABLE
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(MpqError, match=name):
            load_latencies(tmp_path / name)


def test_latencies_interpolate_and_extrapolate():
    table = LatencyTable(tuple(Latency("int4-g32", 1, size, 1, 2.0 * size) for size in (10, 30)))
    table = LatencyTable((*table.entries, Latency("int4-g32", 1, 20, 1, 100.0)))
    assert [table.seconds("int4-g32", 1, size) for size in (10, 20, 30)] == [20.0, 100.0, 60.0]
    assert table.seconds("int4-g32", 2, 5) == 20.0  # of another shape, as many weights
    assert table.seconds("int4-g32", 3, 10) == 60.0
    assert table.seconds("int4-g32", 1, 5) == 10.0
    assert table.seconds("int4-g32", 1, 60) == 120.0
    assert table.seconds("int4-g32", 1, 15) == 60.0


def test_keys_and_values_count_by_their_format_and_context():
    keys, values = (Layer(f"cache.0.{kind}", kind, 2, 16) for kind in ("keys", "values"))
    scheme, layer = parse_scheme("kv:int4-asym"), Layer("a", "linear", 100, 100)
    measured = (
        Latency(scheme.name, 2, 16, 1, 4e-3, "keys", 1000),
        Latency(scheme.name, 2, 16, 1, 8e-3, "keys", 2000),
        Latency(scheme.name, 2, 16, 1, 1e-3, "values", 1000),
    )
    table = LatencyTable((*TABLE.entries, *measured))
    seconds = table.cost(1, 1500)
    assert seconds(keys, scheme) == pytest.approx(6e-3)
    assert seconds(values, scheme) == pytest.approx(1.5e-3)
    assert seconds(replace(keys, window=500), scheme) == pytest.approx(2e-3)
    assert seconds(layer, parse_scheme("int4-g128")) == 1e-3
    assert table.cost(1)(keys, scheme) == TABLE.cost(1, 1500)(keys, scheme) == 0
    with pytest.raises(MpqError, match=r"values in kv:int3-token at batch 1.*bench --attention"):
        seconds(values, parse_scheme("kv:int3"))
    with pytest.raises(MpqError, match="batch 2"):
        table.cost(2, 1500)(values, scheme)
