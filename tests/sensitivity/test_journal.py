"""Journals of interrupted measurements, and who may resume them."""

import pytest

from mpq.core.errors import MpqError
from mpq.sensitivity.journal import Journal

SETTINGS = {"metric": "loss", "seed": 0, "schemes": ("int4", "int8")}


def test_values_survive_bit_for_bit(tmp_path):
    journal = Journal(tmp_path / "deep" / "j", SETTINGS)
    numbers = [0.1, 1 / 3, -5e-324, float("inf"), 2.0**60]
    journal.note("layer, one", numbers)
    again = Journal(tmp_path / "deep" / "j", SETTINGS)
    assert again.recall("layer, one") == numbers
    assert again.recall("other") is None


def test_a_truncated_line_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, SETTINGS)
    journal.note("a", [1.0])
    journal.note("b", [2.0])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        torn = Journal(path, SETTINGS)
        torn.note("c", [3.0])
        again = Journal(path, SETTINGS)
        assert again.recall("c") == [3.0]
        assert (again.recall("a") is None) == (length < whole.index(b"\n", whole.index(b"\n") + 1) + 1)
        assert again.recall("b") is None


def test_other_settings_are_refused(tmp_path):
    Journal(tmp_path / "j", SETTINGS)
    with pytest.raises(MpqError, match=r"other settings \(seed\): use the same ones"):
        Journal(tmp_path / "j", {**SETTINGS, "seed": 1})


def test_other_files_are_refused(tmp_path):
    (tmp_path / "j").write_text("layer,kind\n1,2\n")
    with pytest.raises(MpqError, match="not a valid record of an unfinished profile"):
        Journal(tmp_path / "j", SETTINGS)
    assert (tmp_path / "j").read_text() == "layer,kind\n1,2\n"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, SETTINGS)
    journal.note("a", [1.0])
    journal.close()
    assert journal.recall("a") == [1.0]
    assert not list(tmp_path.iterdir())
