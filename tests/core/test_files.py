"""Files are there whole or not at all."""

import pytest

from mpq.core.files import write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def fail():
        with write_atomically(target) as draft:
            draft.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_missing_folders_are_made(tmp_path):
    with write_atomically(tmp_path / "a" / "b.json") as draft:
        draft.write_text("{}")
    assert (tmp_path / "a" / "b.json").read_text() == "{}"
