"""Sensitivity tables survive saving and loading bit for bit, and damaged files are reported in one sentence."""

import csv
import math
from dataclasses import replace

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.mix import parse_mix
from mpq.core.table import COLUMNS, SensitivityTable

LAYERS = (
    Layer("embed", "embedding", 16, 8, aliases=("head", "other.head")),
    Layer('odd, "name"', "linear", 3, 7, macs=21, tie="block.qkv"),
)
SCHEMES = ("int4-g32", "fp8-e4m3", "int8-channel+a:int8-token")


def table(scores=None, errors=None, **provenance):
    scores = np.array([[0.1, -1e-300, 3.0], [float("nan"), 1 / 3, 5e17]]) if scores is None else scores
    errors = np.full((2, 3), 1e-9) if errors is None else errors
    return SensitivityTable(LAYERS, SCHEMES, scores, errors, "output", provenance)


@given(st.lists(st.floats(allow_infinity=False), min_size=12, max_size=12))
@settings(max_examples=50)
def test_any_table_survives_saving_and_loading_bit_for_bit(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    scores, errors = np.array(numbers).reshape(2, 2, 3)
    saved = table(scores, errors, model="a # model", seed=3, reference_loss=numbers[0] if numbers[0] == 1 else 0.1)
    saved.save(path)
    loaded = SensitivityTable.load(path)
    assert loaded == saved
    assert not np.any(np.signbit(loaded.scores) != np.signbit(saved.scores), where=~np.isnan(scores))


def test_pandas_reads_the_file_as_it_reads_the_table(tmp_path):
    table(model="m").save(tmp_path / "t.csv")
    frame = pandas.read_csv(tmp_path / "t.csv", comment="#")
    expected = table().to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["bytes"].tolist() == expected["bytes"].tolist()
    np.testing.assert_allclose(frame["score"], expected["score"], rtol=1e-15)


def test_bytes_count_scales():
    frame = table().to_pandas()
    assert frame["bytes"].tolist()[0] == 16 * 4 + 16 * 2  # sixteen rows of 8 weights in 4 bits, each with an fp16 scale


def test_every_truncation_of_the_file_is_detected(tmp_path):
    path = tmp_path / "t.csv"
    table(model="m").save(path)
    whole = path.read_text()
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(MpqError, match=r"t\.csv is not a valid sensitivity table"):
            SensitivityTable.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("score", "skore"), ("0.1,", "zero,"), ("int4-g32", "int4-g3x"), ("output", "fisher"), ("linear,3", "linear,4")],
)
def test_garbled_files_are_reported(tmp_path, old, new):
    path = tmp_path / "t.csv"
    table().save(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(MpqError, match=r"t\.csv is not a valid sensitivity table"):
        SensitivityTable.load(path)


def test_binary_and_missing_files_are_reported(tmp_path):
    (tmp_path / "t.csv").write_bytes(bytes(range(256)))
    with pytest.raises(MpqError, match="not a text file"):
        SensitivityTable.load(tmp_path / "t.csv")
    with pytest.raises(MpqError, match="No such file"):
        SensitivityTable.load(tmp_path / "absent.csv")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.csv"
    table().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        table(model=object()).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_infinite_scores_name_the_layer():
    with pytest.raises(MpqError, match="of layer embed in fp8-e4m3"):
        table(np.array([[0.0, math.inf, 0], [0, 0, 0]]))


def test_shapes_and_names_must_fit():
    with pytest.raises(MpqError, match="scores of shape"):
        table(np.zeros((3, 2)))
    with pytest.raises(MpqError, match="each layer once"):
        SensitivityTable((LAYERS[0],) * 2, SCHEMES, np.zeros((2, 3)), np.zeros((2, 3)), "output")


def test_any_layer_name_without_a_carriage_return_survives(tmp_path):
    names = ("a$b$c", "a[0] x", "<b>&", "tab\tnew\nline", 'quo"te,', "# %20", " ", "=x", "\u2028")
    layers = tuple(Layer(name, "linear", 8, 8, aliases=(f"{name}2", "100% é")) for name in names)
    table = SensitivityTable(layers, ("int4-g64",), np.ones((len(names), 1)), np.zeros((len(names), 1)), "m", {})
    table.save(tmp_path / "table.csv")
    assert SensitivityTable.load(tmp_path / "table.csv") == table
    with pytest.raises(MpqError, match="carriage return: rename the module"):
        Layer("a\rb", "linear", 8, 8)


def test_reasons_require_a_layer_without_any_score():
    scores = np.array([[np.nan, 0.5, 1.0], [np.nan] * 3])
    reasoned = SensitivityTable(LAYERS, SCHEMES, scores, scores, "output", {}, {LAYERS[1].name: "no sample"})
    assert list(reasoned.reasons) == [LAYERS[1].name]
    with pytest.raises(MpqError, match="names embed: expected a layer whose scores are all NaN"):
        SensitivityTable(LAYERS, SCHEMES, scores, scores, "output", {}, {"embed": "no sample"})


@pytest.mark.parametrize("sizes", [(0, 8, 0), (16, 0, 0), (16, 8, -1)])
def test_layers_of_impossible_sizes_are_reported(sizes, tmp_path):
    path = tmp_path / "t.csv"
    table().save(path)
    path.write_text(path.read_text().replace("embed,embedding,16,8,0", f"embed,embedding,{','.join(map(str, sizes))}"))
    with pytest.raises(MpqError, match=r"layer embed of \d+ x \d+ weights"):
        SensitivityTable.load(path)


def test_negative_sizes_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    table().save(path)
    path.write_text(path.read_text().replace("embed,embedding,16,8,0", "embed,embedding,-16,-8,0"))
    with pytest.raises(MpqError, match="layer embed of -16 x -8 weights"):
        SensitivityTable.load(path)


def test_files_without_the_columns_of_later_versions_load(tmp_path):
    table().save(tmp_path / "t.csv")
    header, names, *rows = (tmp_path / "t.csv").read_text().splitlines()
    kept = [place for place, name in enumerate(names.split(",")) if name not in ("aliases", "window")]
    lines = list(csv.reader([names, *rows]))
    with (tmp_path / "old.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([line[place] for place in kept] for line in lines)
    old = SensitivityTable.load(tmp_path / "old.csv")
    assert header.startswith("# ")
    assert old.layers == tuple(replace(layer, aliases=()) for layer in LAYERS)


MIX = "int2-g64/int4-g64@3.25"


def mixed(**changes):
    """Eight rows of 34 bytes more or less: a table of one layer without scores and one with a mix."""
    layers = (Layer("a", "linear", 8, 64), Layer("b", "linear", 8, 64))
    scores = np.array([[np.nan, np.nan], [1.0, 2.0]])
    room = parse_mix(MIX).nbytes(8, 64) - 1 - 8 * 18
    assigned = ("1" * (room // 16)).rjust(8, "0")
    values = {
        "layers": layers, "schemes": ("int4-g64", MIX), "scores": scores, "errors": scores / 4, "metric": "m",
        "provenance": {"seed": 1}, "reasons": {"a": "no sample"}, "assignments": {"b": {MIX: assigned}}, **changes,
    }  # fmt: skip
    return SensitivityTable(**values)


def test_tables_differ_when_any_field_differs():
    assert mixed() == mixed()
    assert (mixed() == "table") is False
    more = np.array([[np.nan, np.nan], [1.0, 2.5]])
    renamed = (Layer("a", "linear", 8, 64), Layer("b", "conv2d", 8, 64))
    for changes in (
        {"layers": renamed}, {"schemes": ("int5-g64", MIX)}, {"metric": "n"}, {"scores": more}, {"errors": more},
        {"provenance": {}}, {"reasons": {}}, {"assignments": {}},
    ):  # fmt: skip
        assert mixed(**changes) != mixed()


@pytest.mark.parametrize(
    "wrong", [{"c": {MIX: "00001111"}}, {"b": {"int4-g64": "00001111"}}, {"b": {"int2-g64/int8-g64@3.25": "00001111"}}]
)
def test_assignments_of_unknown_layers_or_mixes_are_refused(wrong):
    with pytest.raises(MpqError, match="expected a layer and a mix of the table"):
        mixed(assignments=wrong)


def test_a_reason_for_a_layer_with_one_score_is_refused():
    with pytest.raises(MpqError, match="names a: expected a layer whose scores are all NaN"):
        mixed(scores=np.array([[np.nan, 0.0], [1.0, 2.0]]))


def test_weights_drops_cache_entries(tmp_path):
    alone = mixed()
    assert alone.weights() is alone
    entries = (Layer("kv", "keys", 8, 4, window=128),)
    whole = alone.with_entries(entries, ("kv:int8-token",), np.array([[7.0]]), np.array([[1.0]]))
    assert whole.entries == entries
    assert whole.weights() == alone
    whole.save(tmp_path / "t.csv")
    assert SensitivityTable.load(tmp_path / "t.csv") == whole
    assert replace(whole, layers=(*alone.layers, replace(entries[0], window=0))) != whole


def test_adding_cache_entries_keeps_the_scores_of_weights():
    scores = np.arange(6.0).reshape(2, 3)
    entries, added = (Layer("kv", "keys", 8, 4),), np.array([[7.0, 8.0]])
    with_cache = table(scores, scores / 2).with_entries(entries, ("kv:int4-token", "kv:int8-token"), added, added / 4)
    assert with_cache.scores[:2, :3].tolist() == scores.tolist()
    assert with_cache.scores[2, 3:].tolist() == [7.0, 8.0]
    assert with_cache.errors[2, 3:].tolist() == [1.75, 2.0]
    assert np.isnan(with_cache.scores[2, :3]).all()
    assert np.isnan(with_cache.scores[:2, 3:]).all()
