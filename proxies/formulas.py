"""Parsing formulas, the text of programs; errors are shown at their position.

sum     product (("+" | "-") product)*
product signed (("*" | "/" | "@") signed)*
signed  "-" signed | NUMBER | STATISTIC | FUNCTION "(" sum ")" | "(" sum ")"
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mpq.core.errors import MpqError, nearest_names
from mpq.core.files import write_atomically
from mpq.core.reading import reading
from mpq.proxies.programs import BINARY, INPUTS, UNARY, Apply, Input, Number, Program, formula, kind_of

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)|(?P<name>[A-Za-z_]\w*)|(?P<symbol>[-+*/@()])|$)")
_OPERATIONS = {symbol: name for name, symbol in BINARY.items()}
DEPTH = 100  # largest nesting of parentheses and signs


def parse(text: str) -> Program:
    """The program that a formula spells.

    Raises:
        MpqError: no formula, with the text and a mark under the character where reading stopped.

    >>> formula(parse("trace/params*sum( square(error) )"))
    'trace / params * sum(square(error))'
    >>> parse("mean(weight * act)")
    Traceback (most recent call last):
    mpq.core.errors.MpqError: formula, character 13: * cannot pair weight with activation elements: reduce one first
      mean(weight * act)
                  ^
    """
    return _Reader(text).whole()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.tokens = text, list[tuple[str, str, int]]()
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.mistake(len(text) - len(text[position:].lstrip()), "unexpected character")
            if match.lastgroup is not None:
                self.tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            position = match.end()
        self.tokens.append(("end", "", len(text)))
        self.next = self.depth = 0

    def mistake(self, position: int, reason: str) -> MpqError:
        shown = self.text.replace("\n", " ").replace("\t", " ")
        return MpqError(f"formula, character {position + 1}: {reason}\n  {shown}\n  {' ' * position}^")

    def whole(self) -> Program:
        program = self.sum()
        kind, token, position = self.tokens[self.next]
        if kind != "end":
            raise self.mistake(position, f"expected an operator or the end, not {token!r}")
        return program

    def sum(self) -> Program:
        return self.chain(self.product, "+-")

    def product(self) -> Program:
        return self.chain(self.signed, "*/@")

    def chain(self, part: Callable[[], Program], symbols: str) -> Program:
        program = part()
        while self.tokens[self.next][1] in tuple(symbols):
            _, symbol, position = self.take()
            right = part()
            if symbol == "/":
                symbol, right = "*", Apply("invert", (right,))
            program = self.typed(Apply(_OPERATIONS[symbol], (program, right)), position)
        return program

    def signed(self) -> Program:
        self.depth += 1
        kind, token, position = self.take()
        if self.depth > DEPTH:
            raise self.mistake(position, f"nested deeper than {DEPTH}")
        program = self.atom(kind, token, position)
        self.depth -= 1
        return program

    def atom(self, kind: str, token: str, position: int) -> Program:
        if token == "-":
            return Apply("neg", (self.signed(),))
        if token == "(":
            program = self.sum()
            self.expect(")")
            return program
        if kind == "number":
            value = float(token)
            if not math.isfinite(value):
                raise self.mistake(position, "this number is too large")
            return Number(value)
        if kind == "name" and token in UNARY:
            self.expect("(")
            argument = self.sum()
            self.expect(")")
            return self.typed(Apply(token, (argument,)), position)
        if kind == "name":
            if token not in INPUTS:
                raise self.mistake(position, f"unknown name {token!r}, {nearest_names(token, [*INPUTS, *UNARY])}")
            return Input(token)
        raise self.mistake(position, f"expected a statistic, a function or a number, not {token or 'the end'!r}")

    def take(self) -> tuple[str, str, int]:
        token = self.tokens[self.next]
        self.next = min(self.next + 1, len(self.tokens) - 1)
        return token

    def expect(self, symbol: str) -> None:
        _, token, position = self.take()
        if token != symbol:
            raise self.mistake(position, f"expected {symbol!r}, not {token or 'the end'!r}")

    def typed(self, program: Program, position: int) -> Program:
        try:
            kind_of(program)
        except MpqError as error:
            raise self.mistake(position, str(error)) from error
        return program


def save_formulas(path: str | os.PathLike[str], programs: Mapping[str, Program]) -> None:
    """Write programs as text, a line `name: formula` each."""
    with write_atomically(path) as draft:
        draft.write_text("".join(f"{name}: {formula(program)}\n" for name, program in programs.items()), "utf-8")


def load_formulas(path: str | os.PathLike[str]) -> dict[str, Program]:
    """Read what `save_formulas` wrote; lines that start with # are left out.

    Raises:
        MpqError: no such file, or a line that does not parse (named).
    """
    with reading(path, "list of formulas", "write it again"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    programs: dict[str, Program] = {}
    for number, line in enumerate(lines, start=1):
        name, colon, text = line.partition(":")
        if line.strip() and not line.startswith("#"):
            if not colon:
                raise MpqError(f"{os.fspath(path)}, line {number}: expected 'name: formula', not {line!r}")
            try:
                programs[name.strip()] = parse(text.strip())
            except MpqError as error:
                raise MpqError(f"{os.fspath(path)}, line {number}: {error}") from error
    return programs
