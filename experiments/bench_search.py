"""Searches against brute force, HAWQ-V3's published configurations, each other and uniform formats.

    python experiments/bench_search.py [--quick] [--only proofs hawq evolution toy fliqs] [--seeds 3]

Evolution is judged on data that neither the table nor the search has seen. FLIQS starts from pretrained weights and
trains on 2,000 images; the uniform format it is compared with trains equally long, in the same way. The last lines are
the figures.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

import reference_models
from hawq_v3 import hawq_v3_problem, published_choices, read_published
from mpq.core.allocation import Allocation
from mpq.core.calibration import Batch, LossFn, cross_entropy, next_token_loss, seeded
from mpq.core.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.core.methods import method_named
from mpq.core.problem import build_problem
from mpq.core.rounding import dequantize
from mpq.core.scheme import parse_scheme
from mpq.search.controller import Controller, Schedule
from mpq.search.evolution import evolution
from mpq.search.exact import exact
from mpq.search.integer import integer
from mpq.search.one_shot import OneShot
from mpq.sensitivity.profile import profile
from mpq.testing.search import small_problem
from mpq.training.fake import FakeQuantization

LADDER = (
    "int2-g32", "int2-channel", "int3-g32", "int3-channel", "int4-g32", "int4-channel", "int5-channel", "int6-channel",
    "int8-channel",
)  # fmt: skip
INTEGERS = tuple(f"int{bits}-channel+a:uint{bits}" for bits in (2, 3, 4, 6, 8))  # inputs come from a ReLU
FLOATS = tuple(f"{name}-channel+a:{name}" for name in ("fp4-e2m1", "fp5-e2m2", "fp6-e3m2", "fp8-e4m3"))


def result(name: str, value: float, goal: str, reached: bool) -> str:
    return f"RESULT {name} {value:.4g} {goal} {'ok' if reached else 'short'}"


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
    """HAWQ-V3's programs: our objective and the published one."""
    same = better = worse = 0
    seconds = 0.0
    for net, facts in read_published(reference_models.data_file("hawq_v3_ilp.json")).items():
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
    """The loss of allocations on some batches; rounded weights are kept, so that an evaluation is a forward pass."""

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
            if allocation is not None:
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
    """A model, its data in three disjoint parts, and the uniform formats to be met at equal size."""

    name: str
    model: nn.Module
    profiled: Sequence[Batch]
    searched: Sequence[Batch]
    unseen: Sequence[Batch]
    loss_fn: LossFn
    formats: tuple[str, ...]
    ladder: tuple[str, ...]


def settings(quick: bool) -> Iterator[Setting]:
    calibration = reference_models.cifar10_calibration(64 if quick else 256, 64)
    test = reference_models.cifar10_test(250)
    for depth in (20,) if quick else (20, 56):
        yield Setting(
            f"resnet{depth}", reference_models.resnet(depth), calibration, test[: 1 if quick else 2],
            test[3:] if quick else test[2:], cross_entropy,
            ("int3-channel",) if quick else ("int3-channel", "int2-g32"), LADDER,
        )  # fmt: skip
    if quick:
        return
    valid = reference_models.wikitext_tokens("valid", 64).split(8)
    yield Setting(
        "llama5m", reference_models.wikitext_llama(), reference_models.wikitext_tokens("train", 16).split(8), valid,
        reference_models.wikitext_tokens("test", 128).split(8), next_token_loss,
        ("int3-g64", "int2-g32"), ("int2-g32", "int2-g64", "int3-g64", "int4-g64", "int8-channel"),
    )  # fmt: skip


def evolve(quick: bool, seeds: int) -> list[str]:
    """Evolution on measured loss against the exact search on the predicted one and uniform, at equal size."""
    lines = []
    print(
        f"\n{'model':9} {'size of':13} {'search':10} {'searched on':>11} {'unseen':>8} {'measured':>8} {'seconds':>8}"
    )
    for setting in settings(quick):
        start = time.perf_counter()
        table = profile(setting.model, setting.profiled, setting.loss_fn, setting.ladder, progress=False)
        profiling = time.perf_counter() - start
        measure = Measuring(setting.model, setting.searched, setting.loss_fn)
        judge = Measuring(setting.model, setting.unseen, setting.loss_fn)
        for format in setting.formats:
            problem = build_problem(table)
            uniform = dict(problem.uniform())[format]
            problem = replace(problem, budgets={"size": float(uniform.size)})
            start = time.perf_counter()
            predicted = exact(problem).allocation(-1)
            contest = {
                "uniform": (uniform, 0.0, 0.0),
                "exact": (predicted, 0.0, profiling + time.perf_counter() - start),
            }
            for seed in range(1 if quick else seeds):
                measure.count, start = 0.0, time.perf_counter()
                found = evolution(problem, evaluate=measure, trials=16 if quick else 60, shares=(0.5, 1.0), seed=seed)
                best = found.allocation(len(found) - 1)
                contest[f"evolution{seed}"] = (best, measure.count, time.perf_counter() - start)
            losses = {}
            for name, (allocation, count, seconds) in contest.items():
                losses[name] = (measure(allocation), judge(allocation))
                print(
                    f"{setting.name:9} {format:13} {name:10} {losses[name][0]:11.4f} {losses[name][1]:8.4f} "
                    f"{count:8.1f} {seconds:8.1f}",
                    flush=True,
                )
            evolved = [losses[name] for name in losses if name.startswith("evolution")]
            worst_gain = min(losses["exact"][0] - on for on, _ in evolved)
            label = f"search_{setting.name}_{format}"
            lines.append(result(f"{label}_evolution_gain_searched", worst_gain, ">=0", worst_gain >= 0))
            gain = float(np.mean([losses["exact"][1] - unseen for _, unseen in evolved]))
            lines.append(result(f"{label}_evolution_gain_unseen", gain, ">=0", gain >= 0))
            over = losses["uniform"][1] - losses["exact"][1]
            lines.append(result(f"{label}_exact_over_uniform", over, ">0", over > 0))
        judge(None)
    return lines


def toy(seeds: int, steps: int) -> list[str]:
    """The controller on 20 decisions of 4 options: quality falls with the distance from hidden best options."""
    found, costs, entropies, without = 0, [], [], []
    for seed in range(seeds):
        best = torch.randint(0, 4, (20,), generator=seeded(seed, "best")).numpy()
        macs = torch.rand(20, generator=seeded(seed, "macs")).numpy() + 0.5
        bits = macs[:, None] * np.array([2.0, 4.0, 6.0, 8.0])
        bits /= bits[np.arange(20), best].sum()
        for weight in (Schedule.entropy_weight, 0.0):
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
    print(
        f"\nFLIQS toy, {steps} steps: optimum in {found} of {seeds} seeds, cost within {100 * max(costs):.2f} %, "
        f"entropy at most {max(entropies):.3f} (without its penalty at least {min(without):.3f})"
    )
    return [
        result("search_fliqs_toy_found", found, f">={int(0.9 * seeds)}/{seeds}", found >= int(0.9 * seeds)),
        result("search_fliqs_toy_cost_error", max(costs), "<0.03", max(costs) < 0.03),
        result("search_fliqs_toy_entropy", max(entropies), "<0.05", max(entropies) < 0.05),
    ]


def augmented(
    images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, flipped and shifted by up to 4 pixels."""
    generator = seeded(seed, "augmentation")
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    for _ in range(steps):
        picked = torch.randint(len(images), (batch_size,), generator=generator)
        y, x = torch.randint(9, (2,), generator=generator).tolist()
        batch = padded[picked, :, y : y + 32, x : x + 32]
        flip = torch.rand(batch_size, generator=generator) < 0.5
        yield torch.where(flip.view(-1, 1, 1, 1), batch.flip(3), batch), labels[picked]


def optimizer_of(
    parameters: Sequence[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def fliqs(steps: int, seeds: int) -> list[str]:
    """ResNet-20, first and last layer in floating point: searched formats against the uniform one of equal BitOps."""
    calibration = reference_models.cifar10_calibration(2000, 2000)[0]
    test = reference_models.cifar10_test(250)
    lines = []
    print(f"\nFLIQS on ResNet-20, {steps} steps of 64 images; top-1 on 1,000 test images (standard error about 0.9)")
    for kind, space, uniform, target in (
        ("integer", INTEGERS, INTEGERS[2], 16 / 64),
        ("float", FLOATS, FLOATS[2], 36 / 64),
    ):
        gains = []
        for seed in range(seeds):
            accuracies = {}
            model = reference_models.resnet(20).train()
            search = OneShot(
                model, space, "bitops", target, exclude=("conv1", "linear"), learned=True, seed=seed,
                schedule=Schedule(steps=steps, rate=0.05, entropy_weight=0.2),
            )  # fmt: skip
            optimizer, decay = optimizer_of([*model.parameters(), *search.parameters()], steps)
            start = time.perf_counter()
            for inputs, labels in augmented(*calibration, steps, 64, seed):
                with search.sample():
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
                search.update(quality=-loss.item())
            seconds = time.perf_counter() - start
            with search.chosen():
                accuracies["searched"] = reference_models.top1(model.eval(), test)
            facts = search.allocation().provenance
            model = reference_models.resnet(20).train()
            layers = find_layers(model, exclude=("conv1", "linear"))
            quantization = FakeQuantization(model, layers, learned=[parse_scheme(uniform).weight])
            quantization.use({layer.name: parse_scheme(uniform) for layer in layers})
            optimizer, decay = optimizer_of([*model.parameters(), *quantization.parameters()], steps)
            for inputs, labels in augmented(*calibration, steps, 64, seed):
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            accuracies["uniform"] = reference_models.top1(model.eval(), test)
            gains.append(100 * (accuracies["searched"] - accuracies["uniform"]))
            bits = " ".join(name.split("-")[0] for name in search.allocation().schemes)
            print(
                f"{kind:8} seed {seed}: searched {100 * accuracies['searched']:.1f} %, {uniform} "
                f"{100 * accuracies['uniform']:.1f} %; cost/target {facts['cost_over_target']:.3f}, entropy "
                f"{facts['entropy']:.3f}, {seconds:.0f} s; {bits}",
                flush=True,
            )
        mean = float(np.mean(gains))
        lines.append(result(f"search_fliqs_resnet20_{kind}_gain", mean, ">=0", mean >= 0))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer instances, seeds and evaluations; no FLIQS on ResNet-20"
    )
    parser.add_argument("--only", nargs="+", choices=("proofs", "hawq", "evolution", "toy", "fliqs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of FLIQS on ResNet-20")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = {
        "proofs": lambda: proofs(50 if options.quick else 200),
        "hawq": hawq,
        "evolution": lambda: evolve(options.quick, options.seeds),
        "toy": lambda: toy(2 if options.quick else 10, 1950),
        "fliqs": lambda: [] if options.quick else fliqs(options.steps, options.seeds),
    }
    lines = [line for name, part in parts.items() if not options.only or name in options.only for line in part()]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
