"""Reading of users' files: every error becomes one sentence."""

import csv
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from zipfile import BadZipFile

from mpq.core.errors import MpqError

# Exceptions of parsers on invalid content; RecursionError is JSON nested too deeply.
DAMAGE = (
    ArithmeticError, AttributeError, BadZipFile, EOFError, LookupError, NotImplementedError, RecursionError, TypeError,
    ValueError, csv.Error, zlib.error,
)  # fmt: skip


@contextmanager
def reading(path: str | os.PathLike[str], what: str, remedy: str) -> Iterator[None]:
    """Turn every exception while a file is read and parsed into MpqError.

    Args:
        path: the file.
        what: the expected content, as "sensitivity table".
        remedy: what to do about a damaged file, as "profile again".

    Raises:
        MpqError: a missing, unreadable or invalid file.
    """
    name = os.fspath(path)
    try:
        yield
    except MpqError as error:
        if name in str(error):
            raise
        raise MpqError(f"{name} is not a valid {what} ({error}): {remedy}") from error
    except OSError as error:
        raise MpqError(f"cannot read the {what} {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MpqError(f"{name} is not a valid {what}: it is not a text file") from error
    except RecursionError as error:
        raise MpqError(f"{name} is not a valid {what} (nested too deeply): {remedy}") from error
    except DAMAGE as error:
        reason = f"no {error}" if isinstance(error, KeyError) else _one_line(error)
        raise MpqError(f"{name} is not a valid {what} ({reason}): {remedy}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
