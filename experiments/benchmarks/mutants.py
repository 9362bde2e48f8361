"""Mutation testing of a module or of some of its lines: which changed operators do the tests not detect?

Every comparison, sign, product, logical operator, minimum, maximum and small integer is changed once, in a copy of the
project, and the module's tests are run; mutants that survive are printed. Annotations are not changed.
`--lines 94,95,202-215` restricts the lines, `--quick` takes the first three mutants. Each run of the tests is a fork of
this process, which has imported the large packages already (Linux and macOS).

    python -m experiments.benchmarks.mutants search/exact.py tests/search/test_exact.py
"""

import argparse
import ast
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

PRELOADED = ("torch", "scipy.optimize", "scipy.sparse", "hypothesis", "pandas")
ROOT = Path(__file__).resolve().parents[2]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin",
         "floor": "ceil", "ceil": "floor", "left": "right", "right": "left", "all": "any", "any": "all"}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, description, changed source) of every mutant."""
    count = len(list(_sites(ast.parse(source))))
    for index in range(count):
        tree = ast.parse(source)
        line, node, field, place, new = list(_sites(tree))[index]
        old = getattr(node, field)[place] if place is not None else getattr(node, field)
        if place is None:
            setattr(node, field, new)
        else:
            getattr(node, field)[place] = new
        yield line, f"{_shown(old)} -> {_shown(new)}", ast.unparse(tree)


def _sites(tree: ast.AST) -> Iterator[tuple[int, ast.AST, str, int | None, object]]:
    annotations = set(_annotations(tree))
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Compare):
            for place, operator in enumerate(node.ops):
                if type(operator) in SWAPS:
                    yield node.lineno, node, "ops", place, SWAPS[type(operator)]()
        elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
            yield node.lineno, node, "op", None, SWAPS[type(node.op)]()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node.lineno, node, "op", None, ast.UAdd()
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, node, "id", None, NAMES[node.id]
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.lineno, node, "attr", None, NAMES[node.attr]
        elif isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 100:
            yield node.lineno, node, "value", None, node.value + 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield node.lineno, node, "value", None, NAMES[node.value]


def _annotations(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                yield from map(id, ast.walk(part))


def _shown(part: object) -> str:
    return type(part).__name__ if isinstance(part, ast.AST) else repr(part)


def survives(copy: Path, module: str, mutant: str, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass with the changed module; a timeout counts as detected."""
    (copy / module).write_text(mutant, encoding="utf-8")
    child = os.fork()
    if not child:
        _run_tests(copy, tests)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(copy: Path, tests: list[str]) -> None:
    """Run the tests in the copy and exit with pytest's code."""
    os.setsid()
    os.chdir(copy)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.environ["PYTHONPATH"] = str(copy)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(folder for folder in sys.path if Path(folder).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        del sys.modules[name]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def lines_of(text: str) -> set[int]:
    """Line numbers of "94,95,202-215"."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="file to change, from the project's folder")
    parser.add_argument("tests", nargs="+", help="tests that should notice")
    parser.add_argument("--lines", default="", help="only these lines, as 94,95,202-215")
    parser.add_argument("--seconds", type=float, default=120, help="of one run of the tests at most")
    parser.add_argument("--quick", action="store_true", help="the first three changes")
    options = parser.parse_args()
    for name in PRELOADED:
        if find_spec(name.split(".")[0]):
            import_module(name)
    source, wanted = (ROOT / options.module).read_text(encoding="utf-8"), lines_of(options.lines)
    chosen = [one for one in mutants(source) if not wanted or one[0] in wanted][: 3 if options.quick else None]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "site", "out"))
        started = time.monotonic()
        if not survives(copy, options.module, source, options.tests, options.seconds):
            sys.exit("the tests fail, or take too long, without any change")
        seconds = min(options.seconds, 5 + 3 * (time.monotonic() - started))  # more is an endless loop
        if survives(copy, options.module, "raise ImportError", options.tests, seconds):
            sys.exit(f"the tests do not import {options.module}")
        for line, change, mutant in sorted(chosen, key=lambda one: one[:2]):
            if survives(copy, options.module, mutant, options.tests, seconds):
                survived += 1
                print(f"{options.module}:{line}: {change}: no test notices", flush=True)
    print(f"{len(chosen)} changes, {survived} not noticed")


if __name__ == "__main__":
    main()
