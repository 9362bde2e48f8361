"""Proxies as programs: small typed expression trees over per-layer statistics (EMQ, arXiv 2307.10554, section 3).

A program gives every layer and scheme an estimate of its loss: lower is better, and layers add up.
Its text is a readable formula, which `mpq.proxies.formulas.parse` reads back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from mpq.core.errors import MpqError, nearest_names

LAYER = "layer"  # the space of one number per layer; other spaces have a matrix per layer


@dataclass(frozen=True)
class Kind:
    """Type of a value: the space of its numbers, and whether they depend on the layer's scheme."""

    space: str  # "layer", "weight", "activation", or "weight'" and "activation'" for products of rows with rows
    by_scheme: bool = False


# name: (kind, what it is). Gradients are those of the mean loss per sample unless said otherwise.
INPUTS: dict[str, tuple[Kind, str]] = {
    "weight": (Kind("weight"), "the weights"),
    "grad": (Kind("weight"), "the loss gradient of each weight"),
    "virtual": (Kind("weight"), "the gradient of the summed outputs on an input of ones"),
    "fisher": (Kind("weight"), "the mean squared gradient of single samples' losses"),
    "hessgrad": (Kind("weight"), "the Hessian times the gradient"),
    "error": (Kind("weight", True), "the quantization error Q(w) - w of each weight"),
    "act": (Kind("activation"), "the layer's outputs on some samples, a row each"),
    "actgrad": (Kind("activation"), "the loss gradients of these outputs, of each sample's own loss"),
    "trace": (Kind(LAYER), "the trace of the layer's Hessian block"),
    "eigenvalue": (Kind(LAYER), "its largest eigenvalue"),
    "similarity": (Kind(LAYER), "the sum over other layers of the outputs' linear CKA"),
    "bits": (Kind(LAYER, True), "bits of a code"),
    "bytes": (Kind(LAYER, True), "stored bytes, scales included"),
    "params": (Kind(LAYER), "the number of weights"),
    "macs": (Kind(LAYER), "multiply-accumulates of a sample"),
}

# name: what it does. Elementwise ones keep the space; "own" ones compare with the layer's own numbers and so need a
# matrix per layer; reductions turn that matrix into one number.
ELEMENTWISE: dict[str, str] = {
    "log": "natural logarithm", "abslog": "log |x|, 0 at 0", "abs": "|x|", "square": "x^2", "exp": "e^x",
    "relu": "max(x, 0)", "invert": "1 / x", "sigmoid": "1 / (1 + e^-x)", "sqrt": "square root", "neg": "-x",
    "sign": "sign",
}  # fmt: skip
OWN: dict[str, str] = {
    "softmax": "e^x over the layer's sum of e^x", "logsoftmax": "its logarithm",
    "normalize": "(x - mean) / standard deviation", "minmax": "(x - min) / (max - min)",
}  # fmt: skip
REDUCTIONS: dict[str, str] = {
    "mean": "mean", "std": "standard deviation", "sum": "sum", "l1": "sum of |x|", "norm": "square root of sum of x^2",
}  # fmt: skip
UNARY: dict[str, str] = {**ELEMENTWISE, **OWN, **REDUCTIONS}
BINARY: dict[str, str] = {"add": "+", "subtract": "-", "multiply": "*", "matmul": "@"}  # EMQ's four


@dataclass(frozen=True)
class Input:
    """One of the layers' statistics."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant, finite and not negative."""

    value: float


@dataclass(frozen=True)
class Apply:
    """A primitive applied to one or two programs."""

    operation: str
    arguments: tuple["Program", ...]


Program: TypeAlias = Input | Number | Apply


def kind_of(program: Program) -> Kind:
    """The kind of a program's value.

    Raises:
        MpqError: an unknown name, or a primitive applied to an unsuitable kind.
    """
    if isinstance(program, Number):
        return Kind(LAYER)
    if isinstance(program, Input):
        if program.name not in INPUTS:
            raise MpqError(f"unknown statistic {program.name!r}: {nearest_names(program.name, INPUTS)}")
        return INPUTS[program.name][0]
    return kind_after(program.operation, tuple(kind_of(argument) for argument in program.arguments))


def kind_after(operation: str, kinds: tuple[Kind, ...]) -> Kind:
    """The kind of a primitive's result; MpqError if it does not apply."""
    if operation in UNARY and len(kinds) == 1:
        (kind,) = kinds
        if operation not in ELEMENTWISE and kind.space == LAYER:
            raise MpqError(f"{operation} needs a matrix per layer, but its argument is one number per layer")
        return Kind(LAYER, kind.by_scheme) if operation in REDUCTIONS else kind
    if operation in BINARY and len(kinds) == 2:
        left, right = kinds
        by_scheme = left.by_scheme or right.by_scheme
        if operation == "matmul":
            if left.space != right.space or left.space not in ("weight", "activation"):
                raise MpqError(f"@ needs two weight or two activation matrices, not {left.space} and {right.space}")
            return Kind(left.space + "'", by_scheme)
        if left.space != right.space and LAYER not in (left.space, right.space):
            raise MpqError(
                f"{BINARY[operation]} cannot pair {left.space} with {right.space} elements: reduce one first"
            )
        return Kind(right.space if left.space == LAYER else left.space, by_scheme)
    raise MpqError(f"unknown primitive {operation!r}: {nearest_names(operation, [*UNARY, *BINARY])}")


def walk(program: Program) -> Iterator[Program]:
    """The program and all its parts."""
    yield program
    if isinstance(program, Apply):
        for argument in program.arguments:
            yield from walk(argument)


def inputs_of(program: Program) -> frozenset[str]:
    """Names of the statistics that the program reads."""
    return frozenset(part.name for part in walk(program) if isinstance(part, Input))


def apply(operation: str, *arguments: Program) -> Program:
    """The primitive applied, shorter than `Apply(operation, (...,))`."""
    return Apply(operation, arguments)


SUM, PRODUCT, SIGN, ATOM = 1, 2, 3, 4  # precedence of operators


def formula(program: Program) -> str:
    """The program as text; `parse` gives the same program back.

    >>> formula(apply("multiply", Input("trace"), apply("invert", Input("params"))))
    'trace / params'
    """
    return _text(program, SUM)


def _text(program: Program, least: int) -> str:
    text, binds = _spelt(program)
    return text if binds >= least else f"({text})"


def _spelt(program: Program) -> tuple[str, int]:
    if isinstance(program, Input):
        return program.name, ATOM
    if isinstance(program, Number):
        return f"{program.value:g}" if float(f"{program.value:g}") == program.value else repr(program.value), ATOM
    operation, arguments = program.operation, program.arguments
    if operation == "neg":
        return f"-{_text(arguments[0], SIGN)}", SIGN
    if operation not in BINARY:
        return f"{operation}({_text(arguments[0], SUM)})", ATOM
    symbol, binds = BINARY[operation], SUM if operation in ("add", "subtract") else PRODUCT
    left, right = arguments
    if operation == "multiply" and isinstance(right, Apply) and right.operation == "invert":
        symbol, right = "/", right.arguments[0]
    return f"{_text(left, binds)} {symbol} {_text(right, binds + 1)}", binds
