"""Files that are there whole or not at all, whoever is killed when."""

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
except ImportError:  # Windows, where drafts of dead writers stay
    fcntl = None  # type: ignore[assignment]

DRAFT = ".mpq-draft-"  # in the names of drafts, behind the name of what they become


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds, delete it when it fails.

    The folder is made when it is missing. The temporary name keeps the suffix, which matplotlib reads. A link is
    followed: what it points to is written. Devices and pipes are written through. Drafts of killed writers are removed.

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
    """Where a path leads: links to files and folders are followed, those to devices and pipes stay.

    Raises:
        MpqError: links that lead nowhere but to themselves.
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
    """Yield a hidden file or directory in `folder` that nobody else takes; removed at the end if it is still there.

    It is locked while its writer lives, so drafts of the same name without a living writer are removed first.
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
    """Remove what killed writers left of drafts of this name."""
    for left in folder.glob(f".{glob.escape(name)}{DRAFT}*{glob.escape(suffix)}"):
        _remove_dead(left)


@contextmanager
def refusals(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell in one sentence what the system refuses while `path` is written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MpqError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def umask() -> int:
    """The permissions that new files do not get."""
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
        except OSError:  # a file system without locks: nobody else can take it for dead either
            return draft, handle
        if draft.exists():  # nobody took it for dead before it was locked
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
    except OSError:  # its writer lives
        pass
    finally:
        os.close(handle)


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink(missing_ok=True)
