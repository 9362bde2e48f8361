"""EMQ's three shapes of programs as strings of genes: drawn, mutated, crossed (arXiv 2307.10554, section 3.2).

sequential: one input through four unary primitives; branched: two inputs through two each, joined by a binary one;
DAG: three nodes after two inputs, each the sum of all before it through a unary primitive of its own. The mean of the
result over a layer is its score; the coupling gene says how the score meets the scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mpq.core.errors import MpqError, nearest_names
from mpq.proxies.programs import BINARY, INPUTS, LAYER, UNARY, Apply, Input, Program, apply, kind_of

Gene = TypeVar("Gene", bound=str)
NOTHING = ""  # the identity

# shape: (inputs, unary primitives, binary primitives)
SHAPES: dict[str, tuple[int, int, int]] = {"sequential": (1, 4, 0), "branched": (2, 4, 1), "dag": (2, 9, 0)}

COUPLINGS = {
    "bits": "-bits * score, as in EMQ's code",
    "error": "score * squared error, as in HAWQ-V2",
    "none": "the score itself, which must depend on the scheme",
}
SOURCES = tuple(name for name in INPUTS if name not in ("bits", "bytes", "macs"))
FIRST_ORDER = (
    "weight",
    "grad",
    "virtual",
    "error",
    "act",
    "actgrad",
    "params",
)  # one forward and backward pass, no Hessian
DATA_FREE = ("weight", "virtual", "error", "params")  # without data

# Operation-sampling prioritization: EMQ's code gives "nothing" 0.2 and the binary ones 0.6, 0.3, 0.05, 0.05. Primitives
# that fail on negative or zero numbers, or want a matrix where most programs have one number, are drawn less often.
RISKY = {"log": 0.2, "sqrt": 0.2, "invert": 0.4, "exp": 0.4, "minmax": 0.5, "normalize": 0.3, "softmax": 0.5,
         "logsoftmax": 0.5, "mean": 0.5, "std": 0.5, "sum": 0.5, "l1": 0.5, "norm": 0.5}  # fmt: skip
UNARY_GENES = (NOTHING, *UNARY)
PRIORITY_UNARY = {NOTHING: 4.0, **{name: RISKY.get(name, 1.0) for name in UNARY}}
PRIORITY_BINARY = {"multiply": 0.6, "add": 0.3, "subtract": 0.05, "matmul": 0.05}
MUTATION = 0.3  # probability per gene


@dataclass(frozen=True)
class Genome:
    """A program of one of the shapes."""

    shape: str
    inputs: tuple[str, ...]
    unary: tuple[str, ...]
    binary: tuple[str, ...]
    coupling: str


@dataclass(frozen=True)
class Pool:
    """Options that genes are drawn from, and whether operation sampling is prioritized."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    inputs: tuple[str, ...] = SOURCES
    couplings: tuple[str, ...] = tuple(COUPLINGS)
    prioritize: bool = True

    def __post_init__(self) -> None:
        for names, known in ((self.shapes, SHAPES), (self.inputs, INPUTS), (self.couplings, COUPLINGS)):
            for name in names:
                if name not in known:
                    raise MpqError(f"unknown gene {name!r}: {nearest_names(name, known)}")
            if not names:
                raise MpqError(f"a pool of genes needs at least one of {', '.join(known)}")

    def draw(self, random: np.random.Generator) -> Genome:
        """A random genome."""
        shape = pick(self.shapes, random)
        inputs, unary, binary = SHAPES[shape]
        sources = tuple(pick(self.inputs, random) for _ in range(inputs))
        if self.prioritize and inputs == 2:
            sources = (sources[0], self.partner(sources[0], random))
        return Genome(
            shape, sources,
            tuple(self.unary_gene(random) for _ in range(unary)),
            tuple(self.binary_gene(random) for _ in range(binary)),
            pick(self.couplings, random),
        )  # fmt: skip

    def partner(self, name: str, random: np.random.Generator) -> str:
        """A second input that can be paired with the first: of the same space, or one number per layer."""
        space = INPUTS[name][0].space
        fitting = [other for other in self.inputs if LAYER in (space, INPUTS[other][0].space) or
                   INPUTS[other][0].space == space]  # fmt: skip
        return pick(fitting, random)

    def unary_gene(self, random: np.random.Generator) -> str:
        """A unary primitive, or none."""
        return _weighted(PRIORITY_UNARY, random) if self.prioritize else pick(UNARY_GENES, random)

    def binary_gene(self, random: np.random.Generator) -> str:
        """A binary primitive."""
        return _weighted(PRIORITY_BINARY, random) if self.prioritize else pick(tuple(BINARY), random)

    def mutate(self, genome: Genome, random: np.random.Generator) -> Genome:
        """The genome with each gene resampled with probability MUTATION, at least one of them."""
        fresh = replace(self, shapes=(genome.shape,)).draw(random)
        sizes = (len(genome.inputs), len(genome.unary), len(genome.binary), 1)
        chosen = random.random(sum(sizes)) < MUTATION
        chosen[random.integers(len(chosen))] = True
        return _mix(genome, fresh, chosen)


def cross(one: Genome, other: Genome, random: np.random.Generator) -> Genome:
    """A child that has each gene from either parent; parents of different shapes give the first one's."""
    if one.shape != other.shape:
        return one
    return _mix(one, other, random.random(len(one.inputs) + len(one.unary) + len(one.binary) + 1) < 0.5)


def _mix(one: Genome, other: Genome, from_other: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Genome:
    genes = zip(from_other, _genes(one), _genes(other), strict=True)
    mixed = [theirs if chosen else ours for chosen, ours, theirs in genes]
    inputs, unary = len(one.inputs), len(one.unary)
    return Genome(
        one.shape, tuple(mixed[:inputs]), tuple(mixed[inputs : inputs + unary]),
        tuple(mixed[inputs + unary : -1]), mixed[-1],
    )  # fmt: skip


def _genes(genome: Genome) -> tuple[str, ...]:
    return (*genome.inputs, *genome.unary, *genome.binary, genome.coupling)


def program_of(genome: Genome) -> Program:
    """The program that the genes spell.

    Raises:
        MpqError: its kinds do not fit, or nothing in it depends on the scheme.
    """
    core = _core(genome)
    kind = kind_of(core)
    score = core if kind.space == LAYER else apply("mean", core)
    if genome.coupling == "bits":
        return apply("multiply", apply("neg", Input("bits")), score)
    if genome.coupling == "error":
        return apply("multiply", score, apply("sum", apply("square", Input("error"))))
    if not kind.by_scheme:
        raise MpqError("nothing in this program depends on the scheme")
    return score


def _core(genome: Genome) -> Program:
    inputs: list[Program] = [Input(name) for name in genome.inputs]
    if genome.shape == "sequential":
        return _through(inputs[0], genome.unary)
    if genome.shape == "branched":
        return Apply(genome.binary[0], (_through(inputs[0], genome.unary[:2]), _through(inputs[1], genome.unary[2:])))
    genes = iter(genome.unary)
    for _ in range(3):
        edges = [_through(node, (next(genes),)) for node in inputs]
        total = edges[0]
        for edge in edges[1:]:
            total = apply("add", total, edge)
        inputs.append(total)
    return inputs[-1]


def _through(program: Program, primitives: Sequence[str]) -> Program:
    for primitive in primitives:
        if primitive != NOTHING:
            program = apply(primitive, program)
    return program


def pick(names: Sequence[Gene], random: np.random.Generator) -> Gene:
    """A uniformly random element."""
    return names[int(random.integers(len(names)))]


def _weighted(weights: dict[str, float], random: np.random.Generator) -> str:
    values = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(values, random.random() * values[-1], side="right"))]
