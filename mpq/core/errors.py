"""`MpqError`: the request cannot be met as it stands; its message says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class MpqError(ValueError):
    """Invalid input. The message says what came, what was expected and what to do; the command line exits with 2."""


class NotFiniteError(MpqError):
    """A loss that is NaN or infinite, because of the data or because quantization broke the model."""


class ChangedBatchError(MpqError):
    """A loss that changes its batch in place, so that no second use of the batch gives the same."""


def expect(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """MpqError where a value is of another type; `what` was expected, and where it comes from."""
    if not isinstance(value, kind):
        came = repr(value)
        raise MpqError(f"expected {what}, not {came if len(came) <= 60 else type(value).__name__}")


def first_line(error: BaseException) -> str:
    """What an error says first, for a sentence about it; its type where it says nothing.

    >>> first_line(ValueError("no such type\\ndetails")), first_line(KeyboardInterrupt())
    ('no such type', 'KeyboardInterrupt')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def summary(error: BaseException) -> str:
    """An error's type and first line, for a sentence about code that may raise anything.

    >>> summary(ValueError("no such type\\ndetails"))
    'ValueError: no such type'
    """
    return f"{type(error).__name__}: {first_line(error)}"


def nearest_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Suffix of an error message: the known names closest to `name`, else the first 12 known names.

    >>> nearest_names("int4-g127", ["int4-g128", "int8-channel", "nvfp4"])
    'did you mean int4-g128?'
    """
    known = list(known)
    close = get_close_matches(name, known, n=limit, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known names: {shown}"
