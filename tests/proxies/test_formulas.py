"""Formulas: printing and parsing are inverse, and errors point at a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.proxies import PROXIES
from mpq.proxies.formulas import load_formulas, parse, save_formulas
from mpq.proxies.programs import (
    BINARY,
    INPUTS,
    UNARY,
    Apply,
    Input,
    Kind,
    Number,
    Program,
    apply,
    formula,
    inputs_of,
    kind_after,
    kind_of,
)


@st.composite
def programs(draw, depth: int = 5) -> Program:
    """Well-typed programs."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        if draw(st.integers(0, 4)) == 0:
            return Number(draw(st.floats(0, 1e30, allow_subnormal=False)))
        return Input(draw(st.sampled_from(sorted(INPUTS))))
    name = draw(st.sampled_from([*UNARY, *BINARY]))
    count = 2 if name in BINARY else 1
    program = Apply(name, tuple(draw(programs(depth=depth - 1)) for _ in range(count)))
    try:
        kind_of(program)
    except MpqError:
        return program.arguments[0]
    return program


@given(programs())
def test_a_printed_program_is_read_back_the_same(program):
    assert parse(formula(program)) == program
    assert formula(parse(formula(program))) == formula(program)


@given(st.text(alphabet="abeghist0123456789.+-*/@() \n_#", max_size=30))
def test_any_text_gives_a_program_or_an_error_position(text):
    try:
        assert formula(parse(text))
    except MpqError as error:
        first, _, mark = str(error).split("\n")
        column = int(first.split("character ")[1].split(":")[0])
        assert mark == "  " + " " * (column - 1) + "^"


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("trace / ", 9),
        ("trace params", 7),
        ("sum(weight", 11),
        ("sum weight", 5),
        ("trce * bits", 1),
        ("mean(weight) + $", 16),
        ("weight * act", 8),
        ("mean(bits)", 1),
        ("bits + softmax(trace)", 8),
        ("trace @ weight", 7),
        ("bits * 1e999", 8),
        ("", 1),
        ("(" * 200 + "bits", 101),
    ],
)
def test_a_mistake_is_shown_at_its_character(text, character):
    with pytest.raises(MpqError, match=f"character {character}:") as caught:
        parse(text)
    assert str(caught.value).split("\n")[2] == "  " + " " * (character - 1) + "^"


def test_operators_have_arithmetic_precedence():
    a, b, c = Input("bits"), Input("trace"), Input("params")
    assert parse("bits - trace - params") == apply("subtract", apply("subtract", a, b), c)
    assert parse("bits - (trace - params)") == apply("subtract", a, apply("subtract", b, c))
    assert parse("bits + trace * params") == apply("add", a, apply("multiply", b, c))
    assert parse("-bits * trace") == apply("multiply", apply("neg", a), b)
    assert parse("bits / trace / params") == parse("bits * invert(trace) * invert(params)")
    assert formula(apply("multiply", a, apply("multiply", b, c))) == "bits * (trace * params)"


def test_kinds_are_checked():
    assert kind_of(parse("weight @ error")) == Kind("weight'", True)
    assert kind_of(parse("act * bits")) == Kind("activation", True)
    assert kind_of(parse("norm(act @ actgrad)")) == Kind("layer")
    with pytest.raises(MpqError, match="did you mean softmax"):
        kind_after("softmx", (Kind("weight"),))
    assert inputs_of(parse("trace / params * sum(square(error))")) == {"trace", "params", "error"}


def test_the_registry_is_made_of_formulas(tmp_path):
    known = {name: parse(text) for name, (text, _) in PROXIES.items()}
    for name, (text, _) in PROXIES.items():
        assert formula(known[name]) == text
        assert kind_of(known[name]).by_scheme
    save_formulas(tmp_path / "proxies.txt", known)
    assert load_formulas(tmp_path / "proxies.txt") == known
    (tmp_path / "proxies.txt").write_text("# ours\n\none: bits\ntwo: bits +\n")
    with pytest.raises(MpqError, match="line 4: formula, character 7"):
        load_formulas(tmp_path / "proxies.txt")
