"""Proxies evolved on three models against HAWQ-V2's, ranking the allocations of a fourth.

    python -m experiments.papers.proxies_left_out [--quick] [--generations N] [--seeds N]

Leaves out each of ResNet-20, ResNet-56, the 5 M parameter Llama and EfficientNet-Lite0 in turn. Statistics are
collected once (out/) and measured allocations are read from experiments/results/benchmark_*.csv, so that evolution
needs no forward pass. The seed of the highest fitness on the three models is judged on the fourth: rank correlation
over all rows, plain and at fixed size, and the lead over HAWQ-V2's with a 95 % bootstrap interval.
"""

import argparse
import time

import numpy as np

from experiments.models import reference_models
from experiments.papers.proxy_models import EVERY, benchmark_of, statistics_of
from experiments.result import result
from mpq.proxies import PROXIES
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.evolution import Settings, evolve_across
from mpq.proxies.formulas import parse
from mpq.proxies.genomes import FIRST_ORDER, SOURCES, Pool
from mpq.proxies.programs import Program
from mpq.proxies.ranking import bootstrap, interval, rankings, steady_fitness
from mpq.proxies.statistics import Statistics

SAMPLES = 1024  # elements per layer: evolution is four times as fast as with the default
INPUTS = tuple(name for name in SOURCES if name != "eigenvalue")
World = tuple[Benchmark, Statistics]


def judge(name: str, world: World, program: Program) -> list[str]:
    """Print the left-out model's row; return its RESULT lines."""
    rows, numbers = world
    known = parse(PROXIES["hawq-v2"][0])
    losses = np.stack([rows.totals(Evaluator(numbers).table(one)) for one in (program, known)])
    if not np.isfinite(losses[0]).all():
        print(f"| {name} | not finite there | | | |", flush=True)
        return [result(f"left_out/{name}_lead", float("nan"), ">0", False)]
    values = rankings(losses, rows.quality, rows.sizes.astype(np.float64))
    draws = bootstrap(losses, rows)
    low, high = interval(draws[0] - draws[1])
    leads = values[0] - values[1]
    cells = [
        f"{values[0, j]:.3f} against {values[1, j]:.3f} | {leads[j]:+.3f} [{low[j]:+.3f}, {high[j]:+.3f}]"
        for j in (0, 3)
    ]
    print(f"| {name} ({len(rows)} rows) | {' | '.join(cells)} |", flush=True)
    return [
        result(f"left_out/{name}_{what}_lead", leads[j], ">0", low[j] > 0)
        for j, what in ((0, "spearman"), (3, "fixed_size"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ResNets, no Hessian but for the trace, 2 generations")
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="only collect the statistics")
    options = parser.parse_args()
    if not reference_models.DATA.exists():
        print("proxies_left_out: ../shared/data is absent, nothing to evolve on")
        return
    names = EVERY[:2] if options.quick else EVERY
    inputs = FIRST_ORDER if options.quick else INPUTS
    tag = "_left_out_quick" if options.quick else "_left_out"
    wanted = (*inputs, "bits", "trace", "params")
    worlds = {name: (benchmark_of(name), statistics_of(name, wanted, tag, SAMPLES)) for name in names}
    if options.collect:
        return
    generations, seeds = (2, 1) if options.quick else (options.generations, options.seeds)
    lines: list[str] = []
    for left in names:
        begun, others = time.perf_counter(), [world for name, world in worlds.items() if name != left]
        settings = [Settings(generations=generations, seed=seed, pool=Pool(inputs=inputs)) for seed in range(seeds)]
        found = [evolve_across(others, one, progress=False) for one in settings]
        best = max(found, key=lambda one: one.best.fitness).best
        judged = sum(one.fates["judged"] for one in found)
        known = parse(PROXIES["hawq-v2"][0])
        theirs = [steady_fitness(rows.totals(Evaluator(numbers).table(known)), rows) for rows, numbers in others]
        print(
            f"\nleft out: {left}; {judged} proxies judged on the others in {time.perf_counter() - begun:.0f} s, "
            f"fitness {best.fitness:.3f} (HAWQ-V2 {np.mean(theirs):.3f}): {best.formula}\n"
            "| left out | all rows: evolved against HAWQ-V2 | lead | at fixed size | lead |\n|---|---|---|---|---|"
        )
        lines += judge(left, worlds[left], best.program)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
