import json
import math

import pytest

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer

LAYERS = (
    Layer("embed", "embedding", 10, 64, aliases=("head",)),
    Layer("a.q_proj", "linear", 64, 64, macs=4096, tie="a.qkv"),
    Layer("a.k_proj", "linear", 64, 64, macs=4096, tie="a.qkv"),
)


def make() -> Allocation:
    return Allocation(LAYERS, ("bf16", "int4-g32", "int8-channel+a:int8-token"), 0.5, 0.1, "fisher", 99, {"seed": 3})


def test_totals_count_scales_and_activations():
    allocation = make()
    assert allocation.size == 10 * 64 * 2 + (64 * 32 + 64 * 2 * 2) + (64 * 64 + 64 * 2)
    assert allocation.bits == 8 * allocation.size / (10 * 64 + 2 * 64 * 64)
    assert allocation.bitops == 4096 * 4 * 16 + 4096 * 8 * 8
    assert allocation.total == allocation.size + 99


def test_a_saved_allocation_loads_as_it_was(tmp_path):
    path = tmp_path / "allocation.json"
    make().save(path)
    assert Allocation.load(path) == make()


def test_an_unpredicted_loss_survives(tmp_path):
    changed = make().with_schemes({"embed": "int8-channel"})
    assert math.isnan(changed.loss)
    assert changed.schemes == ("int8-channel", *make().schemes[1:])
    changed.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json").schemes == changed.schemes


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("layers"),
        lambda values: values.update(kind="something"),
        lambda values: values["layers"]["embed"].update(scheme="int9"),
        lambda values: values["layers"]["embed"].update(scheme="fp32"),
        lambda values: values["layers"]["embed"].update(rows=-1),
        lambda values: values.update(layers=[]),
        lambda values: values.update(layers={}, size=0),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "allocation.json"
    values = make().to_json()
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(MpqError, match=r"allocation\.json is not a valid allocation"):
        Allocation.load(path)


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "allocation.json"
    make().save(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(MpqError, match="not a valid allocation"):
        Allocation.load(path)
    with pytest.raises(MpqError, match="cannot read"):
        Allocation.load(tmp_path / "none.json")


def test_wrong_names_and_counts_are_refused():
    with pytest.raises(MpqError, match="one scheme for each of 3 layers"):
        Allocation(LAYERS, ("bf16",))
    with pytest.raises(MpqError, match="unknown layer 'nobody'"):
        make().with_schemes({"nobody": "bf16"})


def test_repr_shows_layers_bits_loss_and_most_frequent_schemes():
    assert repr(make()).startswith("Allocation(3 layers at 7.072 bits, ")
    assert "predicted loss +0.5: 1 x bf16, 1 x int4-g32, 1 x int8-channel+a:int8-token)" in repr(make())
    layers = tuple(Layer(f"l{i}", "linear", 8, 64) for i in range(7))
    schemes = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int4-g64", "int4-g64")
    text = repr(Allocation(layers, schemes))
    assert "loss" not in text
    assert "3 x int4-g64" in text
    assert text.endswith(", and 1 more)")
    assert "more" not in repr(Allocation(layers[:4], schemes[:4]))


@pytest.mark.parametrize(
    ("field", "least", "valid"),
    [
        ("rows", 1, True), ("cols", 1, True), ("macs", 0, True),
        ("rows", 0, False), ("cols", 0, False), ("macs", -1, False),
    ],
)  # fmt: skip
def test_layers_without_weights_are_refused(field, least, valid):
    values = Allocation((Layer("a", "linear", 3, 5, macs=7),), ("int8-channel",)).to_json()
    record = values["layers"]["a"]
    record[field] = least
    values["size"] = record["rows"] * (record["cols"] + 2)
    if valid:
        assert getattr(Allocation.from_json(values).layers[0], field) == least
        return
    with pytest.raises(ValueError, match="layer a of"):
        Allocation.from_json(values)


def test_memory_without_a_cache_is_that_of_the_model():
    assert make().memory(1000, 4) == make().total
