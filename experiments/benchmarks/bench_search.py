"""Searches against brute force, HAWQ-V3's published configurations, each other and uniform formats.

    python -m experiments.benchmarks.bench_search [--quick] [--only proofs hawq toy workers contest show]
        [--models resnet20 ...]

Evolution is judged on data that neither the table nor the search has seen. The contest appends to a file of results, so
that it can be run in pieces; `--only show` prints the file, with FLIQS on ResNet-20 (`experiments/papers/fliqs.py`).
RESULT lines come last.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks import search_rows
from experiments.models import reference_models
from experiments.papers import fliqs
from experiments.papers.hawq_v3 import PUBLISHED, hawq_v3_problem, published_choices, read_published
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.problem import Problem, build_problem
from mpq.core.table import SensitivityTable
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss, seeded
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.rounding import method_named
from mpq.rounding.reference import dequantize
from mpq.search.controller import Controller, Schedule
from mpq.search.evolution import evolution
from mpq.search.exact import exact
from mpq.search.integer import integer
from mpq.sensitivity.profile import profile
from mpq.testing.search import small_problem

LADDER = (
    "int2-g32", "int2-channel", "int3-g32", "int3-channel", "int4-g32", "int4-channel", "int5-channel", "int6-channel",
    "int8-channel",
)  # fmt: skip
MODELS = ("resnet20", "resnet56", "llama5m")
PARTS = ("proofs", "hawq", "toy", "workers", "contest", "show")


def proofs(instances: int) -> list[str]:
    """The exact frontier and the integer program against enumeration."""
    agree = {"exact": 0, "integer": 0}
    for seed in range(instances):
        problem = small_problem(seed, 4 + seed % 3, share=None)
        every = np.array(list(product(*(np.flatnonzero(np.isfinite(row)) for row in problem.losses))))
        rows = np.arange(len(problem.groups))
        sizes, losses = problem.costs["size"][rows, every].sum(1), problem.losses[rows, every].sum(1)
        budgets = np.unique(sizes)
        best = np.array([losses[sizes <= budget].min() for budget in budgets])
        frontier = exact(problem)
        ours = [frontier.losses[frontier.index_at(cost=float(budget))] for budget in budgets]
        agree["exact"] += bool(np.allclose(ours, best, rtol=1e-9))
        at = int(np.random.default_rng(seed).integers(len(budgets)))
        solved = integer(replace(problem, budgets={"size": float(budgets[at])}))
        agree["integer"] += bool(np.isclose(solved.losses[0], best[at], rtol=1e-6))
    print(f"\nbrute force on {instances} random problems: {agree}")
    return [
        result(f"search_{name}_equals_brute_force", n, f"={instances}", n == instances) for name, n in agree.items()
    ]


def hawq() -> list[str]:
    """Compare the optimum of HAWQ-V3's integer programs with the published configurations."""
    same = better = worse = 0
    seconds = 0.0
    for net, facts in read_published(PUBLISHED).items():
        for name, bits in facts["published"].items():
            problem = hawq_v3_problem(facts, name)
            start = time.perf_counter()
            (choices,) = integer(problem, cost=name.split("_")[0]).choices
            seconds += time.perf_counter() - start
            theirs, rows = published_choices(problem, bits), np.arange(len(choices))
            ours_loss, their_loss = problem.losses[rows, choices].sum(), problem.losses[rows, theirs].sum()
            same += np.array_equal(choices, theirs)
            if not np.array_equal(choices, theirs):
                better += ours_loss < their_loss
                worse += ours_loss >= their_loss
                print(f"{net} {name}: loss {ours_loss:.5f} against the published {their_loss:.5f}")
    print(f"\nHAWQ-V3: {same} configurations as published, {better} better, {worse} worse; {seconds:.2f} s altogether")
    return [result("search_hawq_v3_same_or_better", same + better, "=18", same + better == 18)]


class Measuring:
    """Measured loss of allocations; rounded weights are cached, so that an evaluation is one forward pass."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn) -> None:
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.original = {
            layer.name: weight_matrix(model.get_submodule(layer.name)).clone() for layer in find_layers(model)
        }
        self.rounded: dict[tuple[str, str], Tensor] = {}
        self.count = 0.0

    @torch.no_grad()
    def __call__(self, allocation: Allocation | None, share: float = 1.0) -> float:
        for name, matrix in self.original.items():
            module = self.model.get_submodule(name)
            if allocation is not None and name in allocation.scheme_of:
                scheme = allocation.scheme_of[name]
                if (name, scheme.name) not in self.rounded:
                    self.rounded[name, scheme.name] = dequantize(method_named("mse")(matrix, scheme.weight, None))
                matrix = self.rounded[name, scheme.name]
            module.weight.copy_(matrix_to_weight(matrix, module))
        used = self.batches[: max(1, round(share * len(self.batches)))]
        self.count += len(used) / len(self.batches)
        return sum(self.loss_fn(self.model, batch).item() for batch in used) / len(used)


@dataclass(frozen=True)
class Setting:
    """A model, its data in three disjoint parts, and the uniform formats whose sizes are the budgets."""

    name: str
    model: nn.Module
    profiled: Sequence[Batch]
    searched: Sequence[Batch]
    unseen: Sequence[Batch]
    loss_fn: LossFn
    formats: tuple[str, ...]
    ladder: tuple[str, ...]


def setting(name: str, quick: bool) -> Setting:
    """The setting of a model; `quick`: less data and one size."""
    if name == "llama5m":
        return Setting(
            name, reference_models.wikitext_llama(), reference_models.wikitext_tokens("train", 16).split(8),
            reference_models.wikitext_tokens("valid", 16).split(8),
            reference_models.wikitext_tokens("test", 128).split(8), next_token_loss,
            ("int3-g64", "int2-g32"), ("int2-g32", "int2-g64", "int3-g64", "int4-g64", "int8-channel"),
        )  # fmt: skip
    calibration = reference_models.cifar10_calibration(64 if quick else 256, 64)
    test = reference_models.cifar10_test(250 if quick else 125)
    return Setting(
        name, reference_models.resnet(int(name.removeprefix("resnet"))), calibration, test[: 1 if quick else 2],
        test[3:] if quick else test[2:], cross_entropy,
        ("int3-channel",) if quick else ("int3-channel", "int2-g32"), LADDER,
    )  # fmt: skip


def cached_table(setting: Setting, folder: Path) -> tuple[SensitivityTable, float]:
    """The model's sensitivity table, cached in a folder, and the seconds that it took."""
    path = folder / f"{setting.name}.csv"
    if not path.exists():
        start = time.perf_counter()
        table = profile(setting.model, setting.profiled, setting.loss_fn, setting.ladder, progress=False)
        table.provenance["seconds"] = time.perf_counter() - start
        folder.mkdir(parents=True, exist_ok=True)
        table.save(path)
    table = SensitivityTable.load(path)
    return table, float(table.provenance["seconds"])


def compete(setting: Setting, seeds: Sequence[int], trials: int, folder: Path, results: Path) -> None:
    """Uniform, exact on predicted loss and evolution on measured loss at equal size; skips rows already in the file."""
    table, profiling = cached_table(setting, folder)
    measure = Measuring(setting.model, setting.searched, setting.loss_fn)
    judge = Measuring(setting.model, setting.unseen, setting.loss_fn)

    def note(case: str, search: str, seed: int, allocation: Allocation, evaluations: float, seconds: float) -> None:
        figures = {
            "bits": allocation.bits, "searched": measure(allocation), "unseen": judge(allocation),
            "evaluations": evaluations, "seconds": seconds,
        }  # fmt: skip
        search_rows.append(results, "contest", case, search, seed, figures)

    for format in setting.formats:
        case = f"{setting.name} {format}"
        problem = build_problem(table)
        uniform = dict(problem.uniform())[format]
        problem = replace(problem, budgets={"size": float(uniform.size)})
        known = search_rows.read(results)
        if ("contest", case, "exact", 0) not in known:
            note(case, "uniform", 0, uniform, 0.0, 0.0)
            start = time.perf_counter()
            predicted = exact(problem).allocation(-1)
            note(case, "exact", 0, predicted, 0.0, profiling + time.perf_counter() - start)
        for seed in seeds:
            if ("contest", case, "evolution", seed) in known:
                continue
            measure.count, start = 0.0, time.perf_counter()
            found = evolution(problem, evaluate=measure, trials=trials, shares=(0.5, 1.0), seed=seed)
            count, seconds = measure.count, time.perf_counter() - start
            note(case, "evolution", seed, found.allocation(len(found) - 1), count, seconds)
    measure(None)


def standings(rows: search_rows.Rows) -> list[str]:
    """Print the contest's table; return its RESULT lines."""
    lines = []
    cases = list(dict.fromkeys(key[1] for key in rows if key[0] == "contest"))
    if cases:
        columns = ("bits", "searched on", "unseen", "measured", "seconds")
        print(f"\n{'size of':27} {'search':12}" + "".join(f"{column:>12}" for column in columns))
    for case in cases:
        entries = {key[2:]: value for key, value in rows.items() if key[:2] == ("contest", case)}
        for (search, seed), row in sorted(entries.items(), key=lambda item: -item[1]["searched"]):
            name = f"{search} {seed}" if search == "evolution" else search
            print(
                f"{case:27} {name:12}{row['bits']:12.3f}{row['searched']:12.4f}{row['unseen']:12.4f}"
                f"{row['evaluations']:12.1f}{row['seconds']:12.1f}"
            )
        evolved = [row for (search, _), row in entries.items() if search == "evolution"]
        best, plain = entries["exact", 0], entries["uniform", 0]
        label = f"search_{case.replace(' ', '_')}"
        over = plain["unseen"] - best["unseen"]
        lines.append(result(f"{label}_exact_over_uniform", over, ">0", over > 0))
        if not evolved:
            continue
        worst = min(best["searched"] - row["searched"] for row in evolved)
        lines.append(result(f"{label}_evolution_gain_searched", worst, ">=0", worst >= 0))
        gains = np.array([best["unseen"] - row["unseen"] for row in evolved])
        lines.append(result(f"{label}_evolution_gain_unseen", float(gains.mean()), ">=0", bool(gains.mean() >= 0)))
        over = min(plain["unseen"] - row["unseen"] for row in evolved)
        lines.append(result(f"{label}_evolution_over_uniform", over, ">0", over > 0))
    return lines


def toy(seeds: int, steps: int, compared: int) -> list[str]:
    """Run the controller on 20 decisions of 4 options whose quality falls with the distance from hidden optima."""
    found, costs, entropies, without = 0, [], [], []
    for seed in range(seeds):
        best = torch.randint(0, 4, (20,), generator=seeded(seed, "best")).numpy()
        macs = torch.rand(20, generator=seeded(seed, "macs")).numpy() + 0.5
        bits = macs[:, None] * np.array([2.0, 4.0, 6.0, 8.0])
        bits /= bits[np.arange(20), best].sum()
        for weight in (Schedule.entropy_weight, 0.0) if seed < compared else (Schedule.entropy_weight,):
            controller = Controller(20, 4, Schedule(steps=steps, entropy_weight=weight), seed)
            for _ in range(steps):
                choices = controller.sample()
                quality = -float(np.abs(choices - best).mean())
                controller.update(choices, quality, bits[np.arange(20), choices].sum())
            if weight:
                found += np.array_equal(controller.best(), best)
                costs.append(abs(bits[np.arange(20), controller.best()].sum() - 1))
                entropies.append(controller.entropy)
            else:
                without.append(controller.entropy)
    bare = f" (without its penalty at least {min(without):.3f})" if without else ""
    print(
        f"\nFLIQS toy, {steps} steps: optimum in {found} of {seeds} seeds, cost within {100 * max(costs):.2f} %, "
        f"entropy at most {max(entropies):.3f}{bare}"
    )
    return [
        result("search_fliqs_toy_found", found, f">=9/{seeds}", found >= 9),
        result("search_fliqs_toy_cost_error", max(costs), "<0.03", max(costs) < 0.03),
        result("search_fliqs_toy_entropy", max(entropies), "<0.05", max(entropies) < 0.05),
    ]


def shared_loss(allocation: Allocation, share: float) -> float:
    """An evaluation that takes half a second and depends on all layers."""
    time.sleep(0.5 * share)
    return float(allocation.loss * (1 + 0.5 * np.sin(sum(map(ord, " ".join(allocation.schemes))))))


def shared_problem() -> Problem:
    """Twelve layers with a budget half-way between smallest and largest."""
    return small_problem(5, 12)


def work(storage: str, trials: int, log: str) -> None:
    """A worker of a shared study; logs its measurements to a file."""

    def evaluate(allocation: Allocation, share: float) -> float:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(" ".join(allocation.schemes) + "\n")
        return shared_loss(allocation, share)

    evolution(shared_problem(), evaluate=evaluate, trials=trials, storage=storage, heartbeat=1.0)


def workers(trials: int) -> list[str]:
    """Compare one and two workers on a study: no lost or repeated evaluations, and the wall time."""
    seconds, repeated, lost = {}, 0, 0
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            storage, log = str(Path(folder) / "journal"), str(Path(folder) / "log")
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=work, args=(storage, trials, log)) for _ in range(number)]
            for process in processes:
                process.start()
            while not Path(log).exists():  # exclude import time
                time.sleep(0.01)
            start = time.perf_counter()
            for process in processes:
                process.join()
            seconds[number] = time.perf_counter() - start
            measured = Path(log).read_text(encoding="utf-8").splitlines()
            found = evolution(shared_problem(), evaluate=shared_loss, trials=trials, storage=storage)
            repeated += len(measured) - len(set(measured))
            lost += len(set(measured)) - len(found.evaluations)
    print(
        f"\n{trials} evaluations of half a second: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s; {repeated} "
        f"repeated, {lost} lost"
    )
    return [
        result("search_two_workers_repeated", repeated, "=0", repeated == 0),
        result("search_two_workers_lost", lost, "=0", lost == 0),
        result("search_two_workers_speed", seconds[1] / seconds[2], ">1", seconds[2] < seconds[1]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer instances and evaluations; ResNet-20 alone")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--trials", type=int, default=40, help="evaluations of an evolution (default: 40)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=search_rows.RESULTS)
    parser.add_argument("--tables", type=Path, default=Path("search-tables"), help="folder for sensitivity tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "rows.csv" if options.quick else options.results
        for part in options.only:
            if part == "proofs":
                lines += proofs(50 if options.quick else 200)
            elif part == "hawq":
                lines += hawq()
            elif part == "workers":
                lines += workers(12 if options.quick else 48)
            elif part == "toy":
                lines += toy(10, 1950, 0 if options.quick else 2)
            elif part == "contest" and options.quick:
                compete(setting("resnet20", True), (0,), 12, Path(scratch), results)
            elif part == "contest":
                for name in options.models:
                    compete(setting(name, False), options.seeds, options.trials, options.tables, results)
        rows = search_rows.read(results)
        lines += standings(rows)
        lines += fliqs.report(rows)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
