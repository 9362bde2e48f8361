"""Damage files of every kind and load them: how many end in a traceback, how many load changed without a word.

    python -m experiments.benchmarks.fuzz [--quick] [--seed 0] [--only tables]

One small artefact of each kind is written: an exported folder, a sensitivity table, a frontier, an allocation, the
journal of an unfinished profile, the journal of a search. Copies are damaged (bytes, numbers, values of JSON and CSV,
lines and files) and loaded by the library's own reader. Any exception but MpqError counts as a traceback. A copy that
loads without error or warning but with other content is a silent change. A truncated journal is valid: a search's may
end after any line, a profile's may lack entries.
"""

import argparse
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import nn

import mpq
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import SavedFrontier
from mpq.core.layer import Layer
from mpq.core.table import SensitivityTable
from mpq.network.layers import find_layers
from mpq.search import frontier_of
from mpq.search.trials import KEY, MEASURED, open_storage, open_study, settle
from mpq.sensitivity.journal import Journal

SETTINGS = {"metric": "output", "seed": 3}
VALUES: tuple[Any, ...] = (None, True, -1, 0, 2**70, 1e400, "", "x", "int8-channel", "../x", [], {}, [[1]], "\0", 0.5)


@dataclass(frozen=True)
class Kind:
    """A kind of artefact: number of damaged copies, functions that write it into a folder and read it."""

    count: int
    write: Callable[[Path], object]
    read: Callable[[Path], str]  # a folder -> all that is used of the artefact, as text
    same: Callable[[str, set[str]], bool] = lambda found, known: found in known


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def write_folder(folder: Path) -> None:
    (folder.parent / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    layers = find_layers(model())
    allocation = Allocation(layers, ("int4-g32", "int8-channel"), 0.5, 0.1, "output", 99, {"model": "m", "seed": 3})
    mpq.export(model(), allocation, folder, side_files=[folder.parent / "tokenizer.json"])


def read_folder(folder: Path) -> str:
    loaded = mpq.load(folder, model=model())
    stored = {name: (str(value.dtype), value.tolist()) for name, value in loaded.state_dict().items()}
    side = folder / "tokenizer.json"
    return repr((loaded, stored, side.read_bytes() if side.is_file() else b""))


def layers_and_table() -> tuple[tuple[Layer, ...], SensitivityTable]:
    layers = (*(Layer(f"l{i}", "linear", 16, 8, 64) for i in range(4)), Layer("odd,#", "conv2d", 8, 8, 1))
    schemes = ("int4-channel", "int8-channel", "bf16")
    scores = np.random.default_rng(0).uniform(0.1, 1, (5, 3)) * [4, 1, 0]
    scores[4] = np.nan
    table = SensitivityTable(layers, schemes, scores, scores / 8, "output", {"model": "m"}, {"odd,#": "no data"})
    return layers, table


def without_gaps() -> SensitivityTable:
    _, table = layers_and_table()
    return SensitivityTable(table.layers[:4], table.schemes, table.scores[:4], table.errors[:4], table.metric)


def read_table(folder: Path) -> str:
    table = SensitivityTable.load(folder / "table.csv")
    numbers = (table.scores.tolist(), table.errors.tolist())
    return repr((table.layers, table.schemes, numbers, table.metric, table.provenance, table.reasons))


def read_frontier(folder: Path) -> str:
    saved = SavedFrontier.load(folder / "frontier.csv")
    return repr((saved.bits.tolist(), saved.losses.tolist(), saved.measured, saved.errors.tolist()))


def write_allocation(folder: Path) -> None:
    layers, _ = layers_and_table()
    schemes = ("int4-channel", "int8-channel", "bf16", "int4-g32", "nf4-g64")
    Allocation(layers, schemes, 0.5, 0.1, "output", 99, {"model": "m", "seed": 3}).save(folder / "allocation.json")


def read_allocation(folder: Path) -> str:
    read = Allocation.load(folder / "allocation.json")
    return repr((read.layers, read.schemes, read.loss, read.error, read.metric, read.overhead, read.provenance))


def write_profile(folder: Path) -> None:
    journal = Journal(folder / "profile", SETTINGS)
    for index in range(12):
        journal.note(f"layer{index}", [index / 7, index / 9, 0.0])


def read_profile(folder: Path) -> str:
    return json.dumps(Journal(folder / "profile", SETTINGS).entries)


def part_of_whole(found: str, known: set[str]) -> bool:
    whole = json.loads(next(iter(known)))
    return all(whole.get(name) == numbers for name, numbers in json.loads(found).items())


def write_study(folder: Path) -> None:
    study = open_study(folder / "study", "mpq", "settings")
    for index in range(5):
        trial = study.ask()
        trial.set_user_attr(KEY, f"key{index}")
        settle(study, trial, MEASURED, [index / 3])


def read_study(folder: Path) -> str:
    storage = open_storage(folder / "study")
    found = []
    for study in storage.get_all_studies():
        trials = storage.get_all_trials(study._study_id)
        facts = [(trial.number, str(trial.state), trial.values, trial.user_attrs) for trial in trials]
        found.append((study.study_name, study.user_attrs, facts))
    return repr(found)


KINDS = {
    "folders": Kind(1000, write_folder, read_folder),
    "tables": Kind(500, lambda folder: layers_and_table()[1].save(folder / "table.csv"), read_table),
    "frontiers": Kind(
        100,
        lambda folder: frontier_of(without_gaps()).save(folder / "frontier.csv"),
        read_frontier,
    ),
    "allocations": Kind(300, write_allocation, read_allocation),
    "journals": Kind(200, write_profile, read_profile, part_of_whole),
    "studies": Kind(200, write_study, read_study),
}


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file; return a description."""
    content = path.read_bytes()
    ways = [flip, cut, insert, overwrite, remove_piece]
    if path.suffix != ".safetensors":
        ways += [repeat_line, remove_line, swap_lines, change_digit, change_value, change_value]
    way = draw.choice(ways)
    path.write_bytes(way(content, draw))
    return f"{way.__name__} in {path.name}"


def flip(content: bytes, draw: random.Random) -> bytes:
    index = draw.randrange(len(content))
    return content[:index] + bytes([content[index] ^ (1 << draw.randrange(8))]) + content[index + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def insert(content: bytes, draw: random.Random) -> bytes:
    index = draw.randrange(len(content))
    return content[:index] + draw.choice([b"\0", b"\0" * 64, b"\xff", b"\n", b'"', b"1", b" "]) + content[index:]


def overwrite(content: bytes, draw: random.Random) -> bytes:
    index, length = draw.randrange(len(content)), draw.randrange(1, 20)
    return content[:index] + draw.randbytes(length) + content[index + length :]


def remove_piece(content: bytes, draw: random.Random) -> bytes:
    index = draw.randrange(len(content))
    return content[:index] + content[index + draw.randrange(1, 20) :]


def repeat_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    index = draw.randrange(len(lines))
    return b"".join([*lines[:index], lines[index], *lines[index:]])


def remove_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    lines.pop(draw.randrange(len(lines)))
    return b"".join(lines)


def swap_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def change_digit(content: bytes, draw: random.Random) -> bytes:
    digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()] or [0]
    index = draw.choice(digits)
    return content[:index] + str(draw.randrange(10)).encode() + content[index + 1 :]


def change_value(content: bytes, draw: random.Random) -> bytes:
    """Change one value in a JSON file or one cell of a CSV file."""
    try:
        values = json.loads(content)
    except ValueError:
        lines = content.decode().split("\n")
        index = draw.randrange(len(lines))
        cells = lines[index].split(",")
        cells[draw.randrange(len(cells))] = draw.choice(["", "nan", "inf", "-1", "0.25", "1e999", "x", "=1+1"])
        return "\n".join([*lines[:index], ",".join(cells), *lines[index + 1 :]]).encode()
    inner = values
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and draw.random() < 0.8:
            inner = inner[key]
            continue
        if draw.random() < 0.3:
            del inner[key]
        else:
            inner[key] = draw.choice(VALUES)
        return json.dumps(values, indent=1).encode() + b"\n"


def retype_tensor(path: Path, draw: random.Random) -> str:
    """Change a dtype to another of the same width, or a shape, in the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    widths = {1: ("I8", "U8", "BOOL", "F8_E4M3"), 2: ("F16", "BF16", "I16"), 4: ("F32", "I32"), 8: ("F64", "I64")}
    same = next(types for types in widths.values() if header[name]["dtype"] in types)
    header[name]["dtype"] = draw.choice(same)
    header[name]["shape"] = header[name]["shape"][::-1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"retype {name} in {path.name}"


@contextmanager
def warnings_logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    logging.getLogger("mpq").addHandler(handler)
    try:
        yield stream
    finally:
        logging.getLogger("mpq").removeHandler(handler)


def known_states(kind: Kind, whole: Path, scratch: Path) -> set[str]:
    """Contents that count as unchanged: the whole artefact's; for a study also those of every prefix of its lines."""
    states = {kind.read(whole)}
    if (whole / "study").is_file():
        lines = (whole / "study").read_bytes().splitlines(keepends=True)
        for count in range(len(lines)):
            scratch.mkdir(exist_ok=True)
            (scratch / "study").write_bytes(b"".join(lines[:count]))
            states.add(kind.read(scratch))
    return states


def outcome(kind: Kind, folder: Path, known: set[str]) -> str:
    """Outcome of loading a damaged artefact: "refused", "warned", "same", "silent" or "traceback: ..."."""
    with warnings_logged() as warned:
        try:
            found = kind.read(folder)
        except MpqError as error:
            return "refused" if "\n" not in str(error) else f"traceback: an error of several lines: {error}"
        except Exception:
            return f"traceback: {traceback.format_exc()}"
    if kind.same(found, known):
        return "same"
    return "warned" if warned.getvalue() else "silent"


def fuzz(name: str, count: int, seed: int) -> dict[str, list[str]]:
    """Load damaged copies; return outcome -> descriptions of the damage."""
    kind, draw = KINDS[name], random.Random(f"{seed} {name}")
    outcomes: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        whole, copy = Path(place, "whole"), Path(place, "copy")
        if name != "folders":
            whole.mkdir()
        kind.write(whole)
        with warnings_logged() as warned:
            known = known_states(kind, whole, Path(place, "part"))
        if warned.getvalue():
            raise SystemExit(f"{name}: the undamaged artefact gives a warning: {warned.getvalue()}")
        for _ in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            path = draw.choice(sorted(path for path in copy.iterdir() if path.is_file()))
            chance = draw.random()
            if name == "folders" and chance < 0.05:
                path.unlink()
                done = f"delete {path.name}"
            elif path.suffix == ".safetensors" and chance < 0.3:
                done = retype_tensor(path, draw)
            else:
                done = damage(path, draw)
            end, _, detail = outcome(kind, copy, known).partition(": ")
            outcomes.setdefault(end, []).append(f"{done} {detail}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("mpq").propagate = False
    good = True
    for name in options.only:
        count = KINDS[name].count // (10 if options.quick else 1)
        outcomes = fuzz(name, count, options.seed)
        print(f"{name}: {count} damaged,", ", ".join(f"{len(done)} {end}" for end, done in sorted(outcomes.items())))
        for end in ("traceback", "silent"):
            done = outcomes.get(end, [])
            for warned in done[:5]:
                print(f"  {end}: {warned}")
            print(result(f"{name}/{end}", len(done), "=0", not done), flush=True)
            good = good and not done
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
