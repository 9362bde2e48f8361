"""Patterns match whole names, and a pattern without a match is an error."""

import pytest

from mpq.core.errors import MpqError
from mpq.core.patterns import match_names

NAMES = ["embed", "blocks.0.q_proj", "blocks.0.fc", "blocks.1.q_proj", "head"]


def test_globs_and_regexes_keep_the_order_of_the_names():
    assert match_names(["head", "*.q_proj"], NAMES) == ["blocks.0.q_proj", "blocks.1.q_proj", "head"]
    assert match_names("re:blocks\\.\\d\\.fc|embed", NAMES) == ["embed", "blocks.0.fc"]


def test_a_regex_matches_the_whole_name():
    with pytest.raises(MpqError, match="matches nothing"):
        match_names("re:blocks", NAMES)


def test_a_name_with_wildcards_matches_itself():
    names = ["experts[0]", "experts0", "a?[!b]", "re:("]
    assert match_names("experts[0]", names) == ["experts[0]", "experts0"]
    assert match_names("a?[!b]", names) == ["a?[!b]"]


def test_an_empty_list_of_patterns_matches_nothing():
    assert match_names((), NAMES) == []


def test_a_pattern_without_match_names_its_neighbours():
    with pytest.raises(MpqError, match=r"'blocks\.0\.qproj' matches nothing: did you mean blocks\.0\.q_proj"):
        match_names(["head", "blocks.0.qproj"], NAMES)


def test_a_broken_regex_is_reported():
    with pytest.raises(MpqError, match="invalid regular expression"):
        match_names("re:blocks.(", NAMES)
