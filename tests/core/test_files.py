"""Files are written atomically."""

import os
import threading
from pathlib import Path

import pytest

from mpq.core.errors import MpqError
from mpq.core.files import DRAFT, draft_in, remove_dead_drafts, write_atomically


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


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("there.json", "not_yet.json"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "there.json").write_text("old")
    for name in ("there.json", "not_yet.json"):
        with write_atomically(tmp_path / name) as draft:
            draft.write_text("new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(MpqError, match="leads to itself"), write_atomically(tmp_path / "loop"):
        pass


def test_pipes_and_devices_are_written_through(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe.csv").read_text()))
    reader.start()
    with write_atomically(tmp_path / "pipe.csv") as draft:
        assert draft.suffix == ".csv"
        draft.write_text("through")
    reader.join()
    assert received == ["through"]
    assert (tmp_path / "pipe.csv").is_fifo()
    with write_atomically("/dev/null") as draft:
        draft.write_text("gone")
    assert Path("/dev/null").is_char_device()


def test_system_errors_become_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MpqError, match=r"cannot write .*file/a.json: "), write_atomically(tmp_path / "file" / "a.json"):
        pass
    with pytest.raises(MpqError, match="is a folder"), write_atomically(tmp_path):
        pass
    with (
        pytest.raises(MpqError, match="cannot write /dev/full: No space left"),
        write_atomically("/dev/full") as draft,
    ):
        draft.write_text("too much")
    with pytest.raises(MpqError, match=r"cannot write .*File name too long"), write_atomically(tmp_path / ("a" * 300)):
        pass


def test_errors_name_the_obstacle(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(MpqError, match=r"cannot write .*table.csv: .*file is no folder"),
        write_atomically(tmp_path / "file" / "table.csv"),
    ):
        pass
    with pytest.raises(MpqError, match="a name holds no zero bytes"), write_atomically(str(tmp_path / "a\0b")):
        pass


def test_drafts_of_dead_processes_are_removed(tmp_path):
    dead = tmp_path / f".table{DRAFT}12345678.csv"
    dead.write_text("half")
    with write_atomically(tmp_path / "table.csv") as first:
        assert not dead.exists()
        first.write_text("first")
        with write_atomically(tmp_path / "table.csv") as second:
            second.write_text("second")
        assert first.exists()
    assert (tmp_path / "table.csv").read_text() == "first"
    assert os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_written_files_have_the_umask_permissions(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_text("")
        with write_atomically(tmp_path / "table.csv") as draft:
            draft.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "table.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_symlinked_drafts_are_not_followed(tmp_path):
    """Its target may be anybody's file."""
    (tmp_path / "precious").write_text("kept")
    (tmp_path / f".table{DRAFT}12345678.csv").symlink_to(tmp_path / "precious")
    remove_dead_drafts(tmp_path, "table", ".csv")
    with draft_in(tmp_path, "table", directory=True) as draft:
        assert draft.is_dir()
        remove_dead_drafts(tmp_path, "table")
        assert draft.is_dir()
    assert not draft.exists()
    assert (tmp_path / "precious").read_text() == "kept"
