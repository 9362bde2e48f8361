"""What a long measurement has found so far, on disk: an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.core.errors import MpqError


class Journal:
    """Named lists of numbers; with a path also lines of a file, each written at once and whole or dropped on reading.

    The first line holds the settings that the numbers depend on. Numbers are written in full, so a resumed run gives
    what an uninterrupted one gives.

    Raises:
        MpqError: the file was left by a run with other settings (named), or is no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.entries: dict[str, list[float]] = {}
        settings = json.loads(json.dumps(dict(settings)))  # as they come back from a file
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path, settings)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(settings)

    def recall(self, name: str) -> list[float] | None:
        """What was noted under this name, None when nothing was."""
        return self.entries.get(name)

    def note(self, name: str, numbers: Sequence[float]) -> None:
        """Keep these numbers under this name."""
        self.entries[name] = list(numbers)
        if self.path is not None:
            self._append([name, *numbers])

    def close(self) -> None:
        """The measurement is complete: remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, line: Any) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")  # the line that was being written when the run was killed
        lines = whole.splitlines()
        try:
            found = json.loads(lines[0]) if lines else settings
            self.entries = {name: numbers for name, *numbers in map(json.loads, lines[1:])}
        except (ValueError, TypeError) as error:
            raise MpqError(f"{path} is not the record of an unfinished profile: delete it to start anew") from error
        if found != settings:
            differing = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
            raise MpqError(
                f"{path} was left by a profile with other settings ({', '.join(differing) or 'of another version'}): "
                "use the same ones to resume, or delete it to start anew"
            )
        if not lines:
            self._append(settings)
