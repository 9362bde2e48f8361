"""The jobs of `mpq proxy`: measure a benchmark, evolve on one half of it, judge proxies on the other."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.network.calibration import Batch, LossFn
from mpq.proxies import PROXIES
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.collect import collect_statistics
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.evolution import Evolution, Settings, evolve
from mpq.proxies.formulas import parse, save_formulas
from mpq.proxies.genomes import FIRST_ORDER, Pool
from mpq.proxies.history import plot_history, save_history
from mpq.proxies.measuring import build_benchmark
from mpq.proxies.programs import inputs_of
from mpq.proxies.ranking import MEASURES, bootstrap, interval, rankings

DEFAULT_SCHEMES = ("int2-channel", "int3-channel", "int4-channel")


@dataclass(frozen=True)
class Standing:
    """Quality of one proxy's ranking of rows."""

    name: str
    formula: str
    values: NDArray[np.float64]  # (4,), in the order of MEASURES
    low: NDArray[np.float64]  # (4,), 95 % bootstrap interval
    high: NDArray[np.float64]


def run_bench(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    output: str | os.PathLike[str],
    *,
    rows: int = 425,
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    pin: Mapping[str, str] | None = None,
    method: str = "mse",
    seed: int = 0,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Benchmark:
    """Measure random configurations and write the table to `output`; an interrupted run resumes from `output`.part.

    Arguments as of `build_benchmark`; `pin` is its `fixed`.
    """
    benchmark = build_benchmark(
        model, batches, loss_fn, schemes, rows, fixed=pin, method=method, seed=seed,
        resume=f"{os.fspath(output)}.part", progress=progress, provenance=provenance,
    )  # fmt: skip
    benchmark.save(output)
    return benchmark


def run_evolve(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    benchmark: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    population: int = 50,
    generations: int = 1000,
    offspring: int = 10,
    seed: int = 0,
    inputs: Sequence[str] = FIRST_ORDER,
    pool: Pool | None = None,
    progress: bool = True,
) -> tuple[Evolution, list[Standing]]:
    """Evolve on one half of a benchmark; the standings on the other half, best first, are those of all proxies.

    Writes to the folder `output`: best.txt (the formula), history.csv, history.png, and statistics.npz and state.json,
    from which a later run resumes.

    Args:
        model: the benchmark's model.
        batches: calibration data for the statistics, other than the benchmark measured.
        loss_fn: the batch's mean loss per sample.
        benchmark: the file.
        output: a folder.
        population, generations, offspring, seed: of the evolution.
        inputs: the statistics that formulas may use; the default ones need no Hessian.
        pool: options of the genes; its inputs replace `inputs`.
        progress: show progress bars.

    Raises:
        MpqError: a benchmark of another model, or a folder with the files of another run.
    """
    rows, folder = Benchmark.load(benchmark), Path(output)
    rows.check_model(model)
    pool = pool or Pool(inputs=tuple(inputs))
    wanted = sorted({*pool.inputs, *FIRST_ORDER, "bits", "bytes", "macs"})
    statistics = collect_statistics(
        model, batches, loss_fn, rows.schemes, wanted=wanted, seed=seed, progress=progress,
        cache=folder / "statistics.npz",
    )  # fmt: skip
    seen, held_out = rows.halves(seed)
    settings = Settings(population=population, generations=generations, offspring=offspring, seed=seed, pool=pool)
    result = evolve(seen, statistics, settings, resume=folder / "state.json", progress=progress)
    save_formulas(folder / "best.txt", {"evolved": result.best.program})
    save_history(folder / "history.csv", result.history)
    with write_atomically(folder / "history.png") as draft:
        plot_history(result.history).savefig(draft)
    evaluator = Evaluator(statistics)
    known = {name: text for name, (text, _) in PROXIES.items() if inputs_of(parse(text)) <= statistics.numbers.keys()}
    return result, standings(held_out, evaluator, {"evolved": result.best.formula, **known}, skip=True)


def run_show(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    benchmark: str | os.PathLike[str],
    proxies: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Standing]:
    """Proxies by how well they rank a benchmark's rows, best first.

    Args:
        model, batches, loss_fn: as of `run_evolve`.
        benchmark: the file.
        proxies: names of the registry or formulas; all of the registry when none are given.
        seed: of the statistics.
        progress: show progress bars.

    Raises:
        MpqError: a benchmark of another model, a formula that does not parse, or one that is not finite on this model.
    """
    rows = Benchmark.load(benchmark)
    rows.check_model(model)
    texts = {text: PROXIES[text][0] if text in PROXIES else text for text in proxies or PROXIES}
    wanted = sorted({name for text in texts.values() for name in inputs_of(parse(text))})
    statistics = collect_statistics(
        model, batches, loss_fn, rows.schemes, wanted=wanted, seed=seed, progress=progress
    )  # fmt: skip
    return standings(rows, Evaluator(statistics), texts, skip=not proxies)


def standings(rows: Benchmark, evaluator: Evaluator, texts: Mapping[str, str], skip: bool = False) -> list[Standing]:
    """The standing of each formula, by name, best first; one that is not finite is refused, or skipped."""
    ranked = []
    for name, text in texts.items():
        try:
            losses = rows.totals(evaluator.finite_table(parse(text)))
        except MpqError:
            if skip:
                continue
            raise
        values = rankings(losses, rows.quality, rows.sizes.astype(np.float64))
        ranked.append(Standing(name, text, values, *interval(bootstrap(losses, rows))))
    return sorted(ranked, key=lambda standing: -float(standing.values.mean()))


def table_of(standings: Sequence[Standing]) -> str:
    """The standings as text, a line each."""
    width = max([len(standing.name) for standing in standings] + [5])
    lines = [" " * width + "  " + "  ".join(f"{measure:>21}" for measure in MEASURES)]
    for standing in standings:
        triples = zip(standing.values, standing.low, standing.high, strict=True)
        cells = "  ".join(f"{value:6.3f} [{low:5.2f}, {high:5.2f}]" for value, low, high in triples)
        lines.append(f"{standing.name:{width}}  {cells}")
    return "\n".join(lines)
