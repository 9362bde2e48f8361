"""Damaged artefacts are refused, or loaded with a warning: never a traceback, never a silent change."""

import json
import logging

import pytest

from experiments.benchmarks.fuzz import KINDS, fuzz, read_allocation, read_frontier, read_study, read_table
from mpq.core.allocation import Allocation
from mpq.core.edits import CHECKSUM, EDITED
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.search.trials import open_storage


@pytest.mark.parametrize("name", KINDS)
def test_no_damage_ends_in_a_traceback_or_a_silent_change(name):
    outcomes = fuzz(name, 30, seed=5)
    assert outcomes.keys() <= {"refused", "warned", "same"}, outcomes
    assert len(outcomes["refused"]) >= 5


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "read"),
    [
        ("tables", "table.csv", "linear", "dense", read_table),
        ("frontiers", "frontier.csv", "bf16", "fp16", read_frontier),
    ],
)
def test_an_edited_csv_file_warns(name, file, old, new, read, tmp_path, caplog):
    path = tmp_path / file
    KINDS[name].write(tmp_path)
    whole = path.read_text()
    read(tmp_path)
    assert not caplog.records
    path.write_text(whole.replace(old, new))
    read(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{file} was edited" in caplog.text
    path.write_text(whole.split("\n", 1)[1])
    read(tmp_path)
    assert f"{file} has no checksum" in caplog.text


def test_an_edited_table_stays_edited_when_it_is_saved_again(tmp_path, caplog):
    KINDS["tables"].write(tmp_path)
    path = tmp_path / "table.csv"
    path.write_text(path.read_text().replace("linear", "dense"))
    SensitivityTable.load(path).save(path)
    caplog.clear()
    again = SensitivityTable.load(path)
    assert again.provenance == {"model": "m", EDITED: True}
    assert not caplog.records


def test_an_edited_allocation_warns(tmp_path, caplog):
    KINDS["allocations"].write(tmp_path)
    path = tmp_path / "allocation.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))  # the same values, formatted differently
    assert EDITED not in Allocation.load(path).provenance
    assert not caplog.records
    path.write_text(json.dumps({**values, "loss": 0.25}))
    assert Allocation.load(path).provenance[EDITED] is True
    assert "allocation.json was edited" in caplog.text
    values.pop(CHECKSUM)
    path.write_text(json.dumps(values))
    read_allocation(tmp_path)
    assert "allocation.json has no checksum" in caplog.text


@pytest.mark.parametrize("change", ["removed", "repeated", "swapped"])
def test_missing_or_extra_lines_of_a_study_are_detected(change, tmp_path):
    KINDS["studies"].write(tmp_path)
    lines = (tmp_path / "study").read_bytes().splitlines(keepends=True)
    middle = {"removed": [], "repeated": lines[4:5] * 2, "swapped": [lines[5], lines[4]]}[change]
    (tmp_path / "study").write_bytes(b"".join([*lines[:4], *middle, *lines[6 if change == "swapped" else 5 :]]))
    with pytest.raises(MpqError, match="study was altered"):
        read_study(tmp_path)


def test_a_study_continues_after_a_truncated_line(tmp_path):
    KINDS["studies"].write(tmp_path)
    path = tmp_path / "study"
    storage = open_storage(path)
    with path.open("ab") as stream:
        stream.write(b'{"op_code":5,"half')
    (study,) = storage.get_all_studies()
    storage.set_study_user_attr(study._study_id, "after", 1)
    assert "'after': 1" in read_study(tmp_path)
