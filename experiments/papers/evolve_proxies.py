"""Evolved proxies against hand-made ones, on the halves of the benchmarks that evolution never saw.

    python -m experiments.papers.evolve_proxies [--quick] [--models resnet20 resnet56 llama5m] [--generations 1000]

Reads experiments/results/benchmark_*.csv (build_benchmarks.py) and caches statistics in out/. For each model, proxies
are evolved on a random half of its rows: from all statistics, from those without Hessian, and from those without data.
Printed: rank correlations on the other half with 95 % bootstrap intervals, the same for proxies evolved on ResNet-20
(transfer), random search with the same number of evaluated proxies, the valid share of random programs, and measured
quality and scoring time of the proxies' allocations at equal size.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.models import reference_models
from experiments.papers.build_benchmarks import load
from experiments.papers.proxy_models import NAMES, OUT, benchmark_of, statistics_of
from experiments.result import result
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.proxies import PROXIES
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.evolution import Evolution, Settings, evolve, random_search, valid_fraction
from mpq.proxies.formulas import load_formulas, parse, save_formulas
from mpq.proxies.genomes import DATA_FREE, FIRST_ORDER, SHAPES, SOURCES, Pool
from mpq.proxies.history import plot_history, save_history
from mpq.proxies.measuring import measure
from mpq.proxies.programs import INPUTS, Program, inputs_of
from mpq.proxies.ranking import MEASURES, bootstrap, interval, rankings
from mpq.proxies.statistics import Statistics
from mpq.quantized import simulate
from mpq.search.exact import exact

POOLS = {
    "all": tuple(name for name in SOURCES if name != "eigenvalue"),
    "first-order": FIRST_ORDER,
    "data-free": DATA_FREE,
}
GENERATIONS = {"resnet20": 1.0, "resnet56": 0.1, "llama5m": 0.1}  # share of --generations: larger statistics
WIDTH = 32


@dataclass(frozen=True)
class World:
    """A model's benchmark halves and statistics."""

    name: str
    seen: Benchmark
    held_out: Benchmark
    statistics: Statistics

    def losses(self, program: Program, half: Benchmark) -> NDArray[np.float64]:
        return half.totals(Evaluator(self.statistics).table(program))


def world(name: str, quick: bool) -> World:
    seen, held_out = benchmark_of(name).halves()
    wanted = (*FIRST_ORDER, "bits", "bytes", "macs") if quick else [x for x in INPUTS if x != "eigenvalue"]
    return World(name, seen, held_out, statistics_of(name, wanted, "_quick" if quick else ""))


def evolved(here: World, pool: str, generations: int, offspring: int) -> Evolution:
    start = time.perf_counter()
    settings = Settings(generations=generations, offspring=offspring, pool=Pool(inputs=POOLS[pool]))
    result = evolve(here.seen, here.statistics, settings)
    seconds = time.perf_counter() - start
    save_history(OUT / f"history_{here.name}_{pool}.csv", result.history)
    plot_history(result.history).savefig(OUT / f"history_{here.name}_{pool}.png")
    print(
        f"{here.name}, {pool} statistics: {generations} generations of {offspring} in {seconds:.0f} s, "
        f"{result.fates['judged']} proxies judged of {sum(result.fates.values())} drawn {dict(result.fates)}\n"
        f"    fitness {result.best.fitness:.3f}: {result.best.formula}",
        flush=True,
    )
    if here.name == "resnet20":
        goal = seconds < 300 and generations >= 1000
        RESULTS.append(result(f"{here.name}_{pool}_evolution_seconds", seconds, "<300 at 1000 generations", goal))
    return result


def judge(here: World, candidates: dict[str, Program]) -> None:
    """Print the held-out table, and the evolved proxies' lead over the best hand-designed one with its interval."""
    known = {name: parse(text) for name, (text, _) in PROXIES.items()}
    known = {name: program for name, program in known.items() if inputs_of(program) <= here.statistics.numbers.keys()}
    programs = {**known, **candidates}
    table = {name: here.losses(program, here.held_out) for name, program in programs.items()}
    table = {name: losses for name, losses in table.items() if np.isfinite(losses).all()}
    names, stacked = list(table), np.stack(list(table.values()))
    half = here.held_out
    values = rankings(stacked, half.quality, half.sizes.astype(np.float64))
    draws = bootstrap(stacked, half)
    low, high = interval(draws)
    print(f"\n{here.name}, {len(half)} held-out rows   " + "   ".join(f"{measure:>22}" for measure in MEASURES))
    for i, name in enumerate(names):
        cells = [f"{values[i, j]:6.3f} [{low[i, j]:6.3f}, {high[i, j]:6.3f}]" for j in range(4)]
        print(f"    {name:{WIDTH}} " + "   ".join(cells), flush=True)
    for name in (name for name in candidates if name in names):
        i = names.index(name)
        for j, what in ((0, "spearman"), (3, "fixed_size")):
            best = max(range(len(names)), key=lambda k: values[k, j] if names[k] in known else -2.0)
            lead = values[i, j] - values[best, j]
            below, above = interval(draws[i] - draws[best])
            print(f"    {name} leads {names[best]} at {what} by {lead:.3f} [{below[j]:.3f}, {above[j]:.3f}]")
            label = f"{here.name}_{name.replace(' ', '_')}_{what}_lead_over_best_handmade"
            RESULTS.append(result(label, lead, ">=0", lead >= 0))


def against_chance(here: World, generations: int, offspring: int, seeds: int) -> None:
    """Compare evolution and random search with the same number of evaluated proxies."""
    print(f"\n{here.name}: evolution and random search at equal budget")
    inputs = tuple(name for name in POOLS["all"] if name in here.statistics.numbers)
    wins, gaps = 0, []
    for seed in range(seeds):
        pool = Pool(inputs=inputs)
        found = evolve(
            here.seen, here.statistics, Settings(generations=generations, offspring=offspring, seed=seed, pool=pool),
            progress=False,
        )  # fmt: skip
        chance = random_search(here.seen, here.statistics, found.fates["judged"], seed, pool)
        fitness = [
            rankings(self_losses, here.held_out.quality, here.held_out.sizes.astype(np.float64)).mean()
            for self_losses in (here.losses(one.program, here.held_out) for one in (found.best, chance))
        ]
        gaps.append(found.best.fitness - chance.fitness)
        wins += gaps[-1] > 0
        print(
            f"    seed {seed}, {found.fates['judged']} judged: evolution {found.best.fitness:.3f} "
            f"(held out {fitness[0]:.3f}), random {chance.fitness:.3f} (held out {fitness[1]:.3f})",
            flush=True,
        )
    RESULTS.append(result(f"{here.name}_evolution_over_random_fitness", float(np.mean(gaps)), ">0", wins == seeds))


def validity(here: World, draws: int) -> None:
    """Valid share of random programs."""
    print(f"\n{here.name}: valid share of {draws} random programs, standard error {0.5 / draws**0.5:.3f} at most")
    inputs = tuple(name for name in POOLS["all"] if name in here.statistics.numbers)
    for shape in SHAPES:
        plain, aided = (
            valid_fraction(here.seen, here.statistics, Pool((shape,), inputs, prioritize=aid), draws)
            for aid in (False, True)
        )
        print(f"    {shape:12} {plain:.3f} without, {aided:.3f} with prioritization", flush=True)
        if shape == "branched":
            RESULTS.append(result("branched_valid_share_gain", aided - plain, ">0.1 (paper)", aided - plain > 0.1))


def allocations(here: World, candidates: dict[str, Program]) -> None:
    """Exact allocations at equal sizes by each proxy, measured on the benchmark's data."""
    model, batches, loss_fn, fixed, _ = load(here.name)
    statistics, seconds = here.statistics, here.statistics.seconds
    known = {name: parse(PROXIES[name][0]) for name in ("hawq-v2", "fisher-error") if
             inputs_of(parse(PROXIES[name][0])) <= statistics.numbers.keys()}  # fmt: skip
    sizes = np.quantile(np.concatenate([here.seen.sizes, here.held_out.sizes]), [0.1, 0.5, 0.9]).astype(int)
    print(
        f"\n{here.name}: loss (accuracy) of exact allocations within {', '.join(map(str, sizes))} bytes; scoring time"
    )
    measured: dict[str, list[float]] = {}
    costs: dict[str, float] = {}
    for name, program in {**known, **candidates}.items():
        scores = Evaluator(statistics).finite_table(program)
        table = SensitivityTable(statistics.layers, statistics.schemes, scores, np.zeros_like(scores), "proxy")
        frontier = exact(build_problem(table, pin=fixed))
        cells, measured[name] = [], []
        for size in sizes:
            allocation = frontier.at(cost=float(size))
            loss, accuracy = measure(simulate(model, allocation, trainable=False), batches, loss_fn)
            cells.append(f"{loss:.4f}" + ("" if np.isnan(accuracy) else f" ({100 * accuracy:.1f} %)"))
            measured[name].append(loss)
        used = inputs_of(program) - {"error"}  # rounding is not part of the scoring time
        costs[name] = sum({seconds[x]: None for x in used})
        print(f"    {name:{WIDTH}} " + "   ".join(cells) + f"   {costs[name]:.3f} s beyond rounding", flush=True)
    for name in candidates:
        for other in known:
            gain = float(np.mean(measured[other]) - np.mean(measured[name]))
            label = f"{here.name}_{name.replace(' ', '_')}_loss_below_{other}"
            RESULTS.append(result(label, gain, ">=0", gain >= 0))
        if "hawq-v2" in costs and "all" not in name:
            ratio = costs["hawq-v2"] / max(costs[name], 1e-6)
            label = f"{here.name}_{name.replace(' ', '_')}_scoring_cheaper_than_trace"
            RESULTS.append(result(label, ratio, ">100", ratio > 100))


RESULTS: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-20, no Hessian, 30 generations")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--offspring", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not reference_models.DATA.exists():
        print("evolve_proxies: ../shared/data is absent, nothing to evolve on")
        return
    torch.set_num_threads(options.threads)
    generations = 30 if options.quick else options.generations
    pools = ("first-order",) if options.quick else tuple(POOLS)
    for name in ("resnet20",) if options.quick else options.models:
        here = world(name, options.quick)
        rounds = round(generations * GENERATIONS[name])
        own = {f"evolved {pool}": evolved(here, pool, rounds, options.offspring).best.program for pool in pools}
        save_formulas(OUT / f"evolved_{name}.txt", own)
        if name == "resnet20":
            validity(here, 200 if options.quick else 2000)
            against_chance(here, 10 if options.quick else 200, options.offspring, 1 if options.quick else 3)
        elif (OUT / "evolved_resnet20.txt").exists():
            transferred = load_formulas(OUT / "evolved_resnet20.txt")
            own |= {f"{label} on resnet20": program for label, program in transferred.items()}
        judge(here, own)
        allocations(here, own)
    print("\n" + "\n".join(RESULTS))


if __name__ == "__main__":
    main()
