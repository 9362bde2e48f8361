"""Output folders: written atomically, with checksums of every file; other files are kept."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpq.core.allocation import KIND, Allocation
from mpq.core.errors import MpqError
from mpq.core.files import draft_in, followed, refusals, remove_dead_drafts, umask, write_atomically
from mpq.core.reading import DAMAGE, reading

log = logging.getLogger(__name__)

ALLOCATION = "allocation.json"
CHECKSUMS = "checksums.json"  # digest of each exported file, or of each tensor in it
WRITING = ".mpq-writing.json"  # names of the exported files while they are replaced
Checksums = dict[str, str | dict[str, str]]


@contextmanager
def write_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder; its files become those of `folder` when the block succeeds.

    Files of an earlier export are replaced, with the checksums last, so that an interrupted replacement is detected on
    loading; meanwhile a list of the exported files is kept in the folder, so that the next export completes it. Other
    files are kept. A link is followed.

    Raises:
        MpqError: the folder is a file, holds a file of the same name from elsewhere, or cannot be written.
    """
    with refusals(folder):
        target = followed(folder)
        if target.exists() and not target.is_dir():
            raise MpqError(f"{target} is a file: give the name of a folder to write into")
        home = target if target.is_dir() else target.parent
        home.mkdir(parents=True, exist_ok=True)
        remove_dead_drafts(target.parent, target.name)
        with draft_in(home, target.name, directory=True) as draft:
            yield draft
            mask = umask()
            draft.chmod(0o777 & ~mask)
            for path in draft.rglob("*"):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            if target.exists():
                _replace(draft, target)
            else:
                os.replace(draft, target)


def names_of(files: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The files' names."""
    return tuple(Path(file).name for file in files)


def copy_side_files(draft: Path, files: Iterable[str | os.PathLike[str]]) -> None:
    """Copy files of the model's source, a tokenizer's or a processor's, into a folder that is being written."""
    for file in files:
        try:
            shutil.copyfile(file, draft / Path(file).name)
        except OSError as error:
            raise MpqError(f"cannot copy {file} beside the model: {error.strerror}") from error


def refuse_foreign(folder: str | os.PathLike[str], names: tuple[str, ...]) -> None:
    """MpqError when `folder` holds a file of one of these names that an earlier export did not write."""
    known = _previous(Path(folder))
    for name in names:
        path = Path(folder) / name
        if path.exists() and name not in known and not _is_allocation(path):
            raise MpqError(f"{path} exists and was not written by an earlier export: choose another folder")


def _replace(draft: Path, target: Path) -> None:
    names = tuple(sorted(path.name for path in draft.iterdir()))
    refuse_foreign(target, names)
    previous = _previous(target)
    with write_atomically(target / WRITING) as note:
        note.write_text(json.dumps(dict.fromkeys([*previous, *names], "")), encoding="utf-8")
    (target / CHECKSUMS).unlink(missing_ok=True)
    for name in previous.keys() - set(names):
        (target / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == CHECKSUMS):
        os.replace(draft / name, target / name)
    (target / WRITING).unlink()


def _previous(folder: Path) -> Mapping[str, Any]:
    """The files of earlier exports, finished or not, by name."""
    known: dict[str, Any] = {}
    for note in (WRITING, CHECKSUMS):
        if (folder / note).is_file():
            known |= {CHECKSUMS: "", **_names_recorded(folder / note)}
    return known


def _is_allocation(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["kind"] == KIND)
    except (OSError, *DAMAGE):
        return False


def write_checksums(folder: Path, tensors: Mapping[str, dict[str, str]]) -> None:
    """Write the digests of all files: of each tensor, or of a whole file without tensors."""
    digests = {path.name: tensors.get(path.name) or _file_digest(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=0) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> Checksums:
    """The checksums that `write_checksums` wrote.

    Raises:
        MpqError: no such file, a damaged one, or one that names a file outside of the folder.
    """
    if not (folder / CHECKSUMS).exists() and (folder / WRITING).is_file():
        raise MpqError(f"an export into {folder} was interrupted: run the same command again to complete it")
    return _names_recorded(folder / CHECKSUMS)


def _names_recorded(path: Path) -> Checksums:
    recorded: Checksums = read_json(path)
    for name in recorded:
        safe_name(name, path)
    return recorded


def read_json(path: Path) -> Any:
    """A JSON object; MpqError when the file is missing or damaged."""
    if not path.exists():
        raise MpqError(f"cannot read {path}: No such file or directory; is {path.parent} an export of mpq?")
    with reading(path, "JSON file of an export", "export again"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise MpqError(f"{path} is damaged (it holds no JSON object): export again")
    return values


def read_checked_json(path: Path, checksums: Checksums) -> Any:
    """A JSON object whose file has the recorded digest; MpqError otherwise."""
    values = read_json(path)
    if digest(path.read_bytes()) != checksums.get(path.name):
        raise MpqError(f"{path} is not as it was exported (its checksum differs): export again")
    return values


def read_allocation(folder: Path) -> Allocation:
    """The allocation of an exported folder.

    Raises:
        MpqError: no export, or one whose allocation is damaged or was altered since.
    """
    path = folder / ALLOCATION
    with reading(path, "allocation", "export again"):
        return Allocation.from_json(read_checked_json(path, read_checksums(folder)))


def check_texts(folder: Path, checksums: Checksums) -> None:
    """MpqError when the config or the allocation of an exported folder was altered; a warning for other texts, such as
    those of a tokenizer.
    """
    for name in ("config.json", ALLOCATION):
        read_checked_json(folder / name, checksums)
    for name, recorded in checksums.items():
        path = folder / name
        if recorded and isinstance(recorded, str) and not (path.is_file() and _file_digest(path) == recorded):
            log.warning("%s was %s after the export", path, "edited" if path.is_file() else "removed")


def safe_name(name: str, source: Path) -> str:
    """The name of a file in the same folder; MpqError when it leads anywhere else."""
    if not name or name in (".", "..") or any(mark in name for mark in "/\\\0:"):
        raise MpqError(f"{source} names the file {name!r}, which is not in its folder: refused")
    return name


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def digest(content: bytes | memoryview) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()
