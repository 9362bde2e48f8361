"""Random problems for the integer search against enumeration: how many crash, how many disagree.

    python -m experiments.benchmarks.random_problems [--quick] [--seed 0]

Tables of up to six layers in up to five formats, with ties, pins and bans. Losses of seven kinds (random, all equal,
all zero, small whole numbers that are often equal, of both signs, zero for most layers, as small or large as floats
allow) meet one to three budgets (bytes, bit operations, seconds), loose, tight, or exactly what an allocation takes. A
case disagrees where the loss is not the least that enumeration finds within the budgets, where a budget is exceeded,
or where one of both says that nothing meets the budgets. The last lines begin with RESULT.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np

from experiments.result import result
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.problem import Array, Problem, build_problem
from mpq.core.table import SensitivityTable
from mpq.search.integer import OBJECTIVE_RANGE, integer

LOSSES = ("random", "equal", "zero", "whole", "signed", "sparse", "extreme")
BUDGETS = (("size",), ("size", "bitops"), ("size", "bitops", "latency"))
SCHEMES = ("int2-g64", "int3-g128", "int4-channel", "fp8-e4m3", "bf16")
CASES = 250  # of each kind of losses with each number of budgets: 5,250


def made(seed: int, kind: str, names: tuple[str, ...]) -> Problem:
    """A random problem with budgets on these costs."""
    random = np.random.default_rng([seed, LOSSES.index(kind), len(names)])
    count = int(random.integers(1, 7))
    schemes = SCHEMES[: int(random.integers(2, 6))]
    layers = tuple(
        Layer(
            f"l{i}", "linear", int(random.integers(1, 33)) * 4, int(random.integers(1, 65)) * 4,
            macs=int(random.integers(0, 1000)), tie=str(random.choice(["", "", "a", "b"])),
        )
        for i in range(count)
    )  # fmt: skip
    scores = losses(random, kind, (count, len(schemes)))
    latency = random.random(scores.shape) * 10.0 ** float(random.integers(-6, 1))
    table = SensitivityTable(layers, schemes, scores, np.zeros_like(scores), "made")
    loose = {layer.name for layer in layers if not layer.tie}
    pin = {name: str(random.choice(schemes)) for name in sorted(loose) if random.random() < 0.15}
    forbid = {name: str(random.choice(schemes)) for name in sorted(loose - pin.keys()) if random.random() < 0.2}
    problem = build_problem(table, pin=pin, forbid=forbid, costs={"latency": latency})
    return replace(problem, budgets={name: budget(random, problem, name) for name in names})


def losses(random: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    """Scores (layers, schemes) of a kind."""
    falling = 4.0 ** -np.arange(shape[1]) * random.lognormal(0, 1.5, shape)
    return {
        "random": falling,
        "equal": np.full(shape, float(random.choice([1.0, 1e-9, -3.0]))),
        "zero": np.zeros(shape),
        "whole": random.integers(0, 4, shape).astype(float),
        "signed": random.normal(size=shape),
        "sparse": falling * (random.random((shape[0], 1)) < 0.3),
        "extreme": falling * float(random.choice([1e-300, 1e-30, 1e30, 1e290])),
    }[kind]


def budget(random: np.random.Generator, problem: Problem, name: str) -> float:
    """Between the least and the largest total, often exactly the total of a random allocation."""
    possible = np.isfinite(problem.losses)
    cost = problem.costs[name]
    if random.random() < 0.5:
        return problem.totals([int(random.choice(np.flatnonzero(row))) for row in possible])[name]
    low = float(np.where(possible, cost, np.inf).min(1).sum())
    high = float(np.where(possible, cost, -np.inf).max(1).sum())
    return low + float(random.random()) * (high - low)


def least(problem: Problem) -> float:
    """Least loss within the budgets, by enumeration; inf where nothing meets them."""
    choices = np.array(list(product(*(np.flatnonzero(row) for row in np.isfinite(problem.losses)))))
    rows = np.arange(len(problem.groups))
    met = np.ones(len(choices), dtype=bool)
    for name, limit in problem.budgets.items():
        met &= np.array([problem.totals(one)[name] <= limit for one in choices])
    return float(problem.losses[rows, choices].sum(1)[met].min(initial=np.inf))


def verdict(problem: Problem) -> str:
    """ "agrees", "disagrees: ...", or "crashes: ..."."""
    best = least(problem)
    try:
        found = integer(problem)
    except MpqError as error:
        return "agrees" if best == np.inf else f"disagrees: {error}, but a loss of {best} meets the budgets"
    except Exception:
        return f"crashes: {traceback.format_exc().strip().splitlines()[-1]}"
    totals = problem.totals(found.choices[0])
    over = [name for name, limit in problem.budgets.items() if totals[name] > limit]
    if over:
        return f"disagrees: {', '.join(over)} exceeded"
    finite = problem.losses[np.isfinite(problem.losses)]
    slack = 1e-5 / OBJECTIVE_RANGE * float(np.ptp(finite)) + 1e-12 * abs(best)
    if abs(found.losses[0] - best) <= slack:
        return "agrees"
    return f"disagrees: a loss of {found.losses[0]}, not {best}"


def main() -> int:
    """Try all kinds; 0 when every case agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, verdicts = time.perf_counter(), Counter[str]()
    for kind, names in product(LOSSES, BUDGETS):
        count = 5 if options.quick else CASES
        for index in range(count):
            said = verdict(made(options.seed * CASES + index, kind, names))
            verdicts[said.split(":")[0]] += 1
            if said != "agrees":
                print(f"{kind} losses, {' and '.join(names)}, case {index}: {said}", flush=True)
    print(f"{verdicts.total()} cases in {time.perf_counter() - started:.0f} s")
    for what in ("crashes", "disagrees"):
        print(result(f"integer_search_{what}", verdicts[what], "=0", not verdicts[what]))
    return 0 if verdicts["agrees"] == verdicts.total() else 1


if __name__ == "__main__":
    sys.exit(main())
