"""Patterns of names: globs, or regular expressions after "re:". A pattern without a match is an error."""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from mpq.core.errors import MpqError, expect, nearest_names


def match_names(patterns: str | Iterable[str], names: Iterable[str], what: str = "layer") -> list[str]:
    """The names that a pattern matches in full, in the order of `names`.

    Args:
        patterns: names or globs ("*.q_proj"), or "re:" and a regular expression for the whole name.
        names: to choose from.
        what: the noun for error messages.

    Raises:
        MpqError: a pattern without a match, or an invalid regular expression.

    >>> match_names(["*.fc", "re:conv[12]"], ["conv1", "conv2", "head.fc", "conv10"])
    ['conv1', 'conv2', 'head.fc']
    """
    names = list(names)
    expect(patterns, Iterable, "a pattern of names, or several")
    picked: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        expect(pattern, str, "a pattern of names, such as '*.q_proj'")
        matches = _matcher(pattern)
        matched = [name for name in names if matches(name)]
        if not matched:
            raise MpqError(
                f"the {what} pattern {pattern!r} matches nothing: {nearest_names(pattern.removeprefix('re:'), names)}"
            )
        picked.update(matched)
    return [name for name in names if name in picked]


def _matcher(pattern: str) -> Callable[[str], bool]:
    if not pattern.startswith("re:"):
        return lambda name: name == pattern or fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise MpqError(f"invalid regular expression {pattern!r}: {error}") from error
    return lambda name: expression.fullmatch(name) is not None
