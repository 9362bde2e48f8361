"""Fitness of genomes after compatibility screening, which rejects invalid ones and duplicates (EMQ, 3.3)."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mpq.core.errors import MpqError
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.genomes import Genome, program_of
from mpq.proxies.programs import Program
from mpq.proxies.ranking import fitness
from mpq.proxies.statistics import Statistics


def check_fit(benchmark: Benchmark, statistics: Statistics) -> None:
    """Refuse statistics that are not those of the benchmark's model.

    Raises:
        MpqError: weights, layers or schemes differ.
    """
    if statistics.provenance.get("weights") != benchmark.provenance.get("weights"):
        raise MpqError("benchmark and statistics are of different models: take those of one model")
    names = [layer.name for layer in benchmark.layers]
    if [layer.name for layer in statistics.layers] != names or statistics.schemes != benchmark.schemes:
        raise MpqError("benchmark and statistics have other layers or schemes: collect the statistics of its schemes")


@dataclass
class Judge:
    """Fitness on the given rows, and counts of screened genomes by outcome."""

    benchmark: Benchmark
    evaluator: Evaluator
    seen: set[str] = field(default_factory=set)  # behaviours with a fitness
    fates: Counter[str] = field(default_factory=Counter)  # kinds, finite, constant, duplicate, judged
    computed: set[Program] = field(default_factory=set)  # programs whose behaviour is in `seen`
    measure: Callable[[NDArray[np.float64], Benchmark], float] = fitness

    def fitness(self, genome: Genome) -> float | None:
        """The genome's fitness; None when it is screened out."""
        try:
            program = program_of(genome)
        except MpqError:
            self.fates["kinds"] += 1
            return None
        if program in self.computed:
            self.fates["duplicate"] += 1
            return None
        fate, losses = self.judge_program(program)
        if losses is not None:
            self.computed.add(program)
            behaviour = _behaviour(losses)
            if behaviour in self.seen:
                fate = "duplicate"
            self.seen.add(behaviour)
        self.fates[fate] += 1
        return self.measure(losses, self.benchmark) if fate == "judged" and losses is not None else None

    def losses(self, genome: Genome) -> tuple[str, NDArray[np.float64] | None]:
        """The screening's summary, and the predicted loss of each row, (rows,)."""
        try:
            program = program_of(genome)
        except MpqError:
            return "kinds", None
        return self.judge_program(program)

    def judge_program(self, program: Program) -> tuple[str, NDArray[np.float64] | None]:
        """As `losses`, of a program."""
        with np.errstate(all="ignore"):
            losses = self.benchmark.totals(self.evaluator.table(program))
        if not np.isfinite(losses).all():
            return "finite", None
        if np.ptp(losses) <= 1e-9 * np.abs(losses).max():
            return "constant", None
        return "judged", losses


@dataclass
class Judges:
    """Fitness over several models, the mean of their own; a genome that one of them screens out has none."""

    judges: tuple[Judge, ...]
    fates: Counter[str] = field(default_factory=Counter)  # judged, screened

    def fitness(self, genome: Genome) -> float | None:
        """The mean fitness, None when it is screened out."""
        values: list[float] = []
        for judge in self.judges:
            value = judge.fitness(genome)
            if value is None:
                self.fates["screened"] += 1
                return None
            values.append(value)
        self.fates["judged"] += 1
        return float(np.mean(values))


def _behaviour(losses: NDArray[np.float64]) -> str:
    """A hash of a score's ranking of the rows: proxies with equal rankings are duplicates."""
    rounded = np.round(losses / np.abs(losses).max(), 9)
    return hashlib.blake2b(rankdata(rounded, method="min").astype(np.int32).tobytes(), digest_size=8).hexdigest()
