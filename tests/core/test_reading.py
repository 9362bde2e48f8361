"""Every reader reports a damaged file in one sentence."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import SavedFrontier
from mpq.core.interactions import Interactions
from mpq.core.latency import load_latencies
from mpq.core.layer import Layer
from mpq.core.reading import reading
from mpq.core.table import SensitivityTable
from mpq.exporters.folder import read_json
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.formulas import load_formulas
from mpq.proxies.statistics import Statistics
from mpq.search.trials import open_storage
from mpq.sensitivity.journal import Journal
from mpq.sources import open_source

READERS: dict[str, Callable[[Path], object]] = {
    "a.json": Allocation.load, "l.json": load_latencies, "c.json": read_json, "t.csv": SensitivityTable.load,
    "f.csv": SavedFrontier.load, "b.csv": Benchmark.load, "i.npz": Interactions.load, "s.npz": Statistics.load,
    "study.log": open_storage, "j.unfinished": lambda path: Journal(path, {}),
    "d.npz": lambda path: open_source("tiny-cnn", str(path)), "d.txt": lambda path: open_source("tiny-lm", str(path)),
    "d.jsonl": lambda path: open_source("tiny-lm", str(path)),
}  # fmt: skip
DAMAGE = {
    "not UTF-8": b"\xff\xfe\x00layer\n",
    "deep": b"[" * 200_000 + b"\n",
    "infinite": b'{"kind": "mpq-allocation", "version": 1, "size": Infinity, "layers": {}, "entries": Infinity}\n',
    "huge cell": b'bits,loss\n"' + b"1" * 200_000 + b'"\n',
    "zip": b"PK\x03\x04" + bytes(range(256)),
    "nul": b"\x00" * 64 + b"\n",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_reported_in_one_sentence(name, damage, tmp_path):
    if name == "d.txt" and damage != "not UTF-8":
        pytest.skip("any text is data")
    if (name, damage) == ("c.json", "infinite"):
        pytest.skip("is JSON")
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(MpqError, match=name) as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith(("study", "j."))])
def test_missing_files_and_folders(name, tmp_path):
    with pytest.raises(MpqError, match=name):
        READERS[name](tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(MpqError, match=name):
        READERS[name](tmp_path / name)


def test_formula_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(MpqError, match="not a text file"):
        load_formulas(tmp_path / "f.txt")


def test_a_changed_byte_of_a_journal_is_detected(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"seed": 1})
    for name in "abc":
        journal.note(name, [0.125, 3.0])
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(50):
        index = draw.randrange(len(whole) - 1)
        path.write_bytes(whole[:index] + bytes([whole[index] ^ (1 << draw.randrange(7))]) + whole[index + 1 :])
        try:
            read = Journal(path, {"seed": 1})
        except MpqError:
            continue
        pytest.fail(f"byte {index} changed and was not detected: {read.entries}")


def test_a_random_table_of_bytes_never_ends_in_a_traceback(tmp_path):
    layers = (Layer("a", "linear", 4, 4), Layer("b", "linear", 4, 4))
    table = SensitivityTable(layers, ("int4-channel", "int8-channel"), np.ones((2, 2)), np.zeros((2, 2)), "fisher")
    table.save(tmp_path / "t.csv")
    whole, draw = (tmp_path / "t.csv").read_bytes(), random.Random(0)
    for _ in range(300):
        index = draw.randrange(len(whole))
        (tmp_path / "t.csv").write_bytes(whole[:index] + draw.randbytes(1) + whole[index + draw.randrange(2) :])
        with suppress(MpqError):
            SensitivityTable.load(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x" * 200), r"\(x{200}\): again$"),
        (ValueError("x" * 201), r"\(x{200}\.\.\.\): again$"),
        (ValueError(), r"\(ValueError\): again$"),
        (OSError("odd"), "cannot read the table file.csv: odd$"),
        (FileNotFoundError(2, "No such file"), "cannot read the table file.csv: No such file$"),
    ],
    ids=["200", "201", "empty", "other", "system"],
)
def test_messages_are_short_and_never_empty(error, message):
    with pytest.raises(MpqError, match=message), reading("file.csv", "table", "again"):
        raise error
