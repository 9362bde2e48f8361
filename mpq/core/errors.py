"""The one exception that means "the request cannot be met as it stands", with a sentence that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class MpqError(ValueError):
    """A mistake in what was asked for: what came, what was expected, what to do. The command line exits with 2."""


class NotFiniteError(MpqError):
    """A loss that is NaN or infinite: of data, or of a model that did not survive what was done to it."""


def nearest_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Suffix for an error message: the known names closest to `name`, or all of them when there are few.

    >>> nearest_names("int4-g127", ["int4-g128", "int8-channel", "nvfp4"])
    'did you mean int4-g128?'
    """
    known = list(known)
    close = get_close_matches(name, known, n=limit, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known names: {shown}"
