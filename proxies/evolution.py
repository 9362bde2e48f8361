"""Evolving proxies: regularized evolution over genomes, with the three aids of EMQ (arXiv 2307.10554, section 3.3).

Operation-sampling prioritization draws promising primitives more often, diversity-prompting selection lets a fresh
random genome compete with every child, compatibility screening rejects a genome before it costs a fitness.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.reading import reading
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.genomes import Genome, Pool, cross, program_of
from mpq.proxies.history import Generation, History
from mpq.proxies.programs import Program, formula
from mpq.proxies.ranking import steady_fitness
from mpq.proxies.screening import Judge, Judges, check_fit
from mpq.proxies.statistics import Statistics

TRIES = 20  # attempts at a valid child before it is given up
SAVE_EVERY = 50  # generations between two writings of the resume file


@dataclass(frozen=True)
class Settings:
    """Settings of an evolution."""

    population: int = 50
    generations: int = 1000
    offspring: int = 10  # children of a generation
    seed: int = 0
    crossover: float = 0.5  # the share of children that have two parents
    diversity: bool = True  # a fresh random genome competes with every child
    removal: str = "worst"  # the member that a child replaces: the "worst", as in EMQ's code, or the "oldest"
    pool: Pool = field(default_factory=Pool)

    def __post_init__(self) -> None:
        if self.population < 4 or self.generations < 0 or self.offspring < 1:
            raise MpqError(
                f"invalid settings of evolution: expected a population of at least 4 and at least 1 offspring, "
                f"not {self.population} and {self.offspring}"
            )
        if self.removal not in ("worst", "oldest"):
            raise MpqError(f"unknown removal {self.removal!r}: expected 'worst' or 'oldest'")


@dataclass(frozen=True)
class Individual:
    """A genome with its fitness on the training rows."""

    genome: Genome
    fitness: float

    @property
    def program(self) -> Program:
        """The program."""
        return program_of(self.genome)

    @property
    def formula(self) -> str:
        """The program as text."""
        return formula(self.program)


@dataclass(frozen=True)
class Evolution:
    """Result of an evolution."""

    best: Individual  # best of all generations
    population: tuple[Individual, ...]  # oldest first
    history: History
    fates: Mapping[str, int]  # number of genomes that passed screening ("judged") and were rejected, by reason


def evolve(
    benchmark: Benchmark,
    statistics: Statistics,
    settings: Settings | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evolution:
    """Find a proxy that ranks the benchmark's rows.

    Args:
        benchmark: the training rows; keep others for judging the result.
        statistics: of the benchmark's model, with every input of the pool.
        settings: population, generations, seed and further options.
        resume: a file of the state, written periodically; an interrupted run with the same settings resumes from it
            with the same result, and a finished one may be continued with more generations.
        progress: show a progress bar with the best formula so far.

    Raises:
        MpqError: statistics of another model, or a `resume` file of other settings or rows.
    """
    settings = settings or Settings()
    check_fit(benchmark, statistics)
    for name in settings.pool.inputs:
        statistics.get(name)
    judge = Judge(benchmark, Evaluator(statistics))
    state = _Resumable(judge, settings)
    if resume is not None and Path(resume).exists():
        state.load(resume)
    elif not state.population:
        state.populate()
    _advance(state, progress, None if resume is None else partial(state.save, resume))
    if resume is not None:
        state.save(resume)
    return Evolution(state.best, tuple(state.population), tuple(state.history), dict(judge.fates))


def evolve_across(
    models: Sequence[tuple[Benchmark, Statistics]], settings: Settings | None = None, *, progress: bool = True
) -> Evolution:
    """Find a proxy that ranks the rows of several models.

    Its fitness is the mean over the models of the rank correlations with quality over all rows, plain and at fixed
    size. Correlations among the best few rows are left out, since evolution would fit their noise.

    Raises:
        MpqError: no models, or statistics of another model than their benchmark's.
    """
    if not models:
        raise MpqError("no models to evolve a proxy on: pass at least one benchmark with its statistics")
    settings = settings or Settings()
    for benchmark, statistics in models:
        check_fit(benchmark, statistics)
    judges = tuple(Judge(rows, Evaluator(numbers), measure=steady_fitness) for rows, numbers in models)
    judge = Judges(judges)
    state = _State(judge, settings)
    state.populate()
    _advance(state, progress)
    return Evolution(state.best, tuple(state.population), tuple(state.history), dict(judge.fates))


def _advance(state: "_State", progress: bool, save: Callable[[], None] | None = None) -> None:
    """Run the remaining generations; `save` is called after every few."""
    settings, done = state.settings, len(state.history) - 1
    with tqdm(total=settings.generations, initial=done, disable=None if progress else True, dynamic_ncols=True) as bar:
        for generation in range(done + 1, settings.generations + 1):
            state.step(generation)
            bar.update()
            bar.set_postfix_str(f"{state.best.fitness:.3f} {state.best.formula[:60]}", refresh=False)
            if save is not None and generation % SAVE_EVERY == 0:
                save()


def random_search(
    benchmark: Benchmark, statistics: Statistics, evaluations: int, seed: int = 0, pool: Pool | None = None
) -> Individual:
    """The best of `evaluations` distinct valid random genomes: the baseline of evolution at the same budget."""
    check_fit(benchmark, statistics)
    judge, random, pool = Judge(benchmark, Evaluator(statistics)), np.random.default_rng(seed), pool or Pool()
    best: Individual | None = None
    for _ in range(evaluations * 200):
        if judge.fates["judged"] >= evaluations:
            break
        genome = pool.draw(random)
        value = judge.fitness(genome)
        if value is not None and (best is None or value > best.fitness):
            best = Individual(genome, value)
    if best is None:
        raise MpqError("no valid proxy was found: allow more inputs or shapes")
    return best


def valid_fraction(benchmark: Benchmark, statistics: Statistics, pool: Pool, draws: int = 2000, seed: int = 0) -> float:
    """Share of random genomes that are finite and not constant, duplicates counted as valid (EMQ, table 6)."""
    judge, random = Judge(benchmark, Evaluator(statistics)), np.random.default_rng(seed)
    return sum(judge.losses(pool.draw(random))[1] is not None for _ in range(draws)) / draws


class _State:
    """An evolution in progress; a generation's random numbers depend only on the seed and its number."""

    def __init__(self, judge: Judge | Judges, settings: Settings) -> None:
        self.judge, self.settings = judge, settings
        self.population: list[Individual] = []  # oldest first
        self.history: list[Generation] = []
        self.best = Individual(Genome("", (), (), (), ""), -np.inf)

    def populate(self) -> None:
        """Generation 0: random genomes."""
        random = np.random.default_rng([self.settings.seed, 0])
        for _ in range(self.settings.population):
            genome = self.fresh(random, tries=200)
            if genome is not None:
                self.population.append(genome)
        if len(self.population) < 2:
            raise MpqError(
                "random programs of these inputs and shapes are almost never valid: allow more inputs or shapes"
            )
        self.note(0)

    def step(self, generation: int) -> None:
        """One generation."""
        random = np.random.default_rng([self.settings.seed, generation])
        for _ in range(self.settings.offspring):
            rivals = [self.child(random)]
            if self.settings.diversity:
                rivals.append(self.fresh(random))
            alive = [rival for rival in rivals if rival is not None]
            if alive:
                self.population.append(max(alive, key=lambda individual: individual.fitness))
                if len(self.population) > self.settings.population:
                    self.remove()
        self.note(generation)

    def child(self, random: np.random.Generator) -> Individual | None:
        """A child of one or two members of the better half: crossed, mutated, or both."""
        ranked = sorted(self.population, key=lambda individual: -individual.fitness)
        parents = ranked[: max(2, len(ranked) // 2)]
        for _ in range(TRIES):
            genome = pick_one(parents, random).genome
            crossed = random.random() < self.settings.crossover
            if crossed:
                genome = cross(genome, pick_one(parents, random).genome, random)
            if not crossed or random.random() < 0.5:
                genome = self.settings.pool.mutate(genome, random)
            value = self.judge.fitness(genome)
            if value is not None:
                return Individual(genome, value)
        return None

    def fresh(self, random: np.random.Generator, tries: int = TRIES) -> Individual | None:
        """A random genome."""
        for _ in range(tries):
            genome = self.settings.pool.draw(random)
            value = self.judge.fitness(genome)
            if value is not None:
                return Individual(genome, value)
        return None

    def remove(self) -> None:
        """Remove a member for a child."""
        if self.settings.removal == "oldest":
            del self.population[0]
        else:
            self.population.remove(min(self.population, key=lambda individual: individual.fitness))

    def note(self, generation: int) -> None:
        """Record the generation in the history."""
        self.best = max([self.best, *self.population], key=lambda individual: individual.fitness)
        fates = self.judge.fates
        self.history.append(
            Generation(
                generation, self.best.fitness, median(individual.fitness for individual in self.population),
                fates["judged"], sum(fates.values()), self.best.formula,
            )
        )  # fmt: skip


class _Resumable(_State):
    """An evolution on one model, whose state can be saved."""

    judge: Judge

    def settings_for_file(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        settings = asdict(replace(self.settings, generations=0))
        choices = self.judge.benchmark.choices
        settings["rows"] = [len(choices), int((choices * (1 + np.arange(choices.size).reshape(choices.shape))).sum())]
        settings["weights"] = self.judge.benchmark.provenance.get("weights")
        loaded: dict[str, Any] = json.loads(json.dumps(settings))
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state."""
        content = {
            "settings": self.settings_for_file(), "population": [asdict(one) for one in self.population],
            "best": asdict(self.best), "history": self.history, "fates": self.judge.fates,
            "seen": sorted(self.judge.seen),
        }  # fmt: skip
        with write_atomically(path) as draft:
            draft.write_text(json.dumps(content), encoding="utf-8")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load the state that `save` wrote."""
        with reading(path, "state of an evolution", "delete it to start again"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            saved = dict(content["settings"])
            self.population = [_individual(one) for one in content["population"]]
            self.best = _individual(content["best"])
            self.history = [Generation(*line) for line in content["history"]]
            self.judge.fates, self.judge.seen = Counter(content["fates"]), set(content["seen"])
        expected = self.settings_for_file()
        if saved != expected:
            differing = ", ".join(key for key in expected if saved.get(key) != expected[key])
            raise MpqError(
                f"{os.fspath(path)} is of an evolution with other settings ({differing}): "
                "use the same ones to resume, or delete it to start again"
            )


def pick_one(individuals: Sequence[Individual], random: np.random.Generator) -> Individual:
    """A uniformly random element."""
    return individuals[int(random.integers(len(individuals)))]


def _individual(content: Mapping[str, Any]) -> Individual:
    genes = content["genome"]
    genome = Genome(
        genes["shape"], tuple(genes["inputs"]), tuple(genes["unary"]), tuple(genes["binary"]), genes["coupling"]
    )
    return Individual(genome, content["fitness"])
