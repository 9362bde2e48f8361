"""Atomic writing of files and folders, safe against processes that are killed."""

import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpq.core.errors import MpqError

try:
    import fcntl
except ImportError:  # Windows: drafts of killed writers are not removed
    fcntl = None  # type: ignore[assignment]

DRAFT = ".mpq-draft-"  # suffix of the final name in a draft's name


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds, delete it when it fails.

    Missing folders are created. The temporary name keeps the suffix, which matplotlib reads. Links are followed.
    Devices and pipes are written directly. Drafts of killed writers are removed.

    Raises:
        MpqError: the path is a folder, or the system refuses (no space, no permission).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_atomically(Path(folder) / "a.txt") as draft:
    ...         _ = draft.write_text("whole")
    ...     (Path(folder) / "a.txt").read_text()
    'whole'
    """
    with refusals(path):
        target = followed(path)
        if target.is_dir():
            raise MpqError(f"{target} is a folder: give the name of a file to write")
        if target.exists() and not target.is_file():
            with tempfile.TemporaryDirectory() as folder:
                draft = Path(folder) / f"draft{target.suffix}"
                yield draft
                with draft.open("rb") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_in(target.parent, target.stem, target.suffix) as draft:
            yield draft
            draft.chmod(0o666 & ~umask())
            os.replace(draft, target)


def followed(path: str | os.PathLike[str]) -> Path:
    """The path with links to files and folders resolved; links to devices and pipes are kept.

    Raises:
        MpqError: a cycle of links.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = stat.S_IFREG  # nothing there yet
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return Path(path)
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise MpqError(f"{os.fspath(path)} is a link that leads to itself: give another name")
    return real


@contextmanager
def draft_in(folder: Path, name: str, suffix: str = "", *, directory: bool = False) -> Iterator[Path]:
    """Yield a new hidden file or directory in `folder`, locked by this process; it is removed at the end.

    Unlocked drafts of the same name belong to killed writers and are removed first.
    """
    remove_dead_drafts(folder, name, suffix)
    draft, handle = _locked(folder, f".{name}{DRAFT}", suffix, directory)
    try:
        yield draft
    finally:
        _remove(draft)
        if handle is not None:
            os.close(handle)


def remove_dead_drafts(folder: Path, name: str, suffix: str = "") -> None:
    """Remove the drafts of this name that killed writers left."""
    for draft in folder.glob(f".{glob.escape(name)}{DRAFT}*{glob.escape(suffix)}"):
        _remove_dead(draft)


@contextmanager
def refusals(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the system while `path` is written into MpqError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        blocking = next((parent for parent in Path(path).parents if parent.exists() and not parent.is_dir()), None)
        if blocking is not None:
            raise MpqError(f"cannot write {os.fspath(path)}: {blocking} is no folder") from error
        raise MpqError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        if "\0" not in os.fspath(path):
            raise
        raise MpqError(f"cannot write {os.fspath(path)!r}: a name holds no zero bytes") from error


def umask() -> int:
    """The process's umask: permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _locked(folder: Path, prefix: str, suffix: str, directory: bool) -> tuple[Path, int | None]:
    """A new draft and the descriptor that holds its lock."""
    while True:
        if directory:
            draft = Path(tempfile.mkdtemp(suffix, prefix, folder))
            handle = os.open(draft, os.O_RDONLY) if fcntl else None
        else:
            handle, name = tempfile.mkstemp(suffix, prefix, folder)
            draft = Path(name)
        if fcntl is None:
            if handle is not None:
                os.close(handle)
            return draft, None
        assert handle is not None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: no other process can lock the draft either
            return draft, handle
        if draft.exists():  # not removed by another process before it was locked
            return draft, handle
        os.close(handle)


def _remove_dead(draft: Path) -> None:
    if fcntl is None:
        return
    try:
        handle = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(draft)
    except OSError:  # its writer is alive
        pass
    finally:
        os.close(handle)


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink(missing_ok=True)
