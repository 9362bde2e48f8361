"""A journal of a long measurement on disk, from which an interrupted run resumes."""

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from mpq.core.errors import MpqError
from mpq.core.files import refusals
from mpq.core.reading import reading
from mpq.network.parallel import gathered, rank_and_count


class Journal:
    """Named lists of numbers; with a path also lines of a file, each written at once and whole or dropped on reading.

    Each line begins with its checksum; the first one holds the settings that the numbers depend on. Numbers are written
    in full, so a resumed run gives what an uninterrupted one gives. Of several processes each writes a file of its own:
    path for rank 0, path.1, path.2, ... for the others; all are read on resuming, with any number of processes.

    Raises:
        MpqError: the file was left by a run with other settings (named), or is no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.whole = None if path is None else Path(path)
        self.path = self.whole
        self.entries: dict[str, list[float]] = {}
        self.untold: list[str] = []  # names not yet shared with other processes
        if self.whole is None:
            return
        settings = json.loads(json.dumps(dict(settings)))  # as read back from a file
        rank, _ = rank_and_count()
        for part in self._parts() if rank == 0 else []:
            self._read(part, settings)
        self.entries = gathered(self.entries)
        self.path = self.whole if rank == 0 else self.whole.with_name(f"{self.whole.name}.{rank}")
        if not self.path.exists():
            with refusals(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(settings)

    def recall(self, name: str) -> list[float] | None:
        """The numbers stored under this name, None if there are none."""
        return self.entries.get(name)

    def note(self, name: str, numbers: Sequence[float]) -> None:
        """Keep these numbers under this name."""
        self.entries[name] = list(numbers)
        self.untold.append(name)
        if self.path is not None:
            self._append([name, *numbers])

    def agree(self, names: Iterable[str]) -> list[list[float]]:
        """Collective: the numbers that any process has stored under these names; call on every rank."""
        self.entries.update(gathered({name: self.entries[name] for name in self.untold}))
        self.untold = []
        return [self.entries[name] for name in names]

    def close(self) -> None:
        """The measurement is complete: remove the file."""
        for part in self._parts() if rank_and_count()[0] == 0 else []:
            part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        if self.whole is None:
            return []
        parts = self.whole.parent.glob(f"{glob.escape(self.whole.name)}*")
        return sorted(path for path in parts if path == self.whole or path.name[len(self.whole.name) + 1 :].isdigit())

    def _append(self, line: Any) -> None:
        assert self.path is not None
        with refusals(self.path), self.path.open("ab") as stream:
            stream.write(_line(line))
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        with reading(path, "record of an unfinished profile", "delete it to start again"):
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            lines = [_checked(line) for line in content[:whole].split(b"\n")[:-1]]
            recorded = lines[0] if lines else settings
            if not lines and not _line(settings).startswith(content):
                raise ValueError("its first line is of another file")
            if whole != len(content):
                os.truncate(path, whole)  # the line that was being written when the run was killed
            self.entries.update({str(name): [float(number) for number in numbers] for name, *numbers in lines[1:]})
        if recorded != settings:
            raise _other_settings(path, recorded, settings)
        if not lines:
            self._append(settings)


def check_settings(path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
    """Refuse a journal whose settings differ from these, which need not be all of them: before anything is measured.

    Raises:
        MpqError: the file was left by a run with other settings (named).
    """
    if path is None or not Path(path).exists():
        return
    with reading(path, "record of an unfinished profile", "delete it to start again"):
        with Path(path).open("rb") as stream:
            first = stream.readline()
        recorded = _checked(first[:-1]) if first.endswith(b"\n") else None
    known = json.loads(json.dumps(dict(settings)))
    if isinstance(recorded, dict) and any(recorded.get(key) != value for key, value in known.items()):
        raise _other_settings(Path(path), recorded, known)


def _other_settings(path: Path, recorded: Any, settings: Mapping[str, Any]) -> MpqError:
    differing = [key for key in settings if not isinstance(recorded, dict) or recorded.get(key) != settings[key]]
    return MpqError(
        f"{path} is of a profile with other settings ({', '.join(differing) or 'of another version'}): "
        "use the same ones to resume, or delete it to start again"
    )


def _line(values: Any) -> bytes:
    text = json.dumps(values).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _checked(line: bytes) -> Any:
    """The values of a line; ValueError if it was altered."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % crc32(text):
        raise ValueError("a line's checksum differs")
    return json.loads(text)
