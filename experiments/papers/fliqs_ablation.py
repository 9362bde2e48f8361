"""Ablation of a one-shot search: entropy schedule, cost model, and the loss of switching a format.

    python -m experiments.papers.fliqs_ablation [--quick] [--network cnn|vit] [--schedules NAMES] [--seeds N]

The bundled network for 8x8 digits or a small vision transformer, from random weights, int2 to int8 weights and
activations at the cost of uniform int3. Every run has the same batches, optimizer and learned step sizes, and trains
its final choice for the last fifth of the steps. Accuracy and loss are those of the final choice on test digits. The
switching error is the loss added to the final choice when one layer switches format, on 192 test digits, averaged over
wider and over narrower formats; "early" is after a quarter of the steps.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpq
from experiments.models.small_vit import SmallViT
from experiments.result import result
from mpq.core.scheme import parse_scheme
from mpq.models import BUNDLED
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.search.controller import Schedule
from mpq.search.one_shot import COSTS, OneShot
from mpq.training.fake import FakeQuantization

BITS = (2, 3, 4, 6, 8)
SPACE = tuple(f"int{bits}-channel+a:int{bits}-token" for bits in BITS)
UNIFORM = SPACE[1]
FEW = 192  # digits that switching errors are measured on
BATCH, LEARNING = 64, 0.8  # share of the steps until the policy is fixed
SCHEDULES = {
    "cosine": Schedule(entropy_weight=0.2), "none": Schedule(entropy_weight=0.0),
    **{kind: Schedule(entropy_weight=0.2, entropy=kind) for kind in ("constant", "linear", "step")},
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements of one run."""

    accuracy: float
    loss: float
    entropy: float = 0.0
    likeliest: float = 1.0  # cost of the likeliest choice over the target
    cost: float = 1.0  # the final choice's cost over the target
    early: float = 0.0  # switching error to other formats, mean, after a quarter of the steps
    wider: float = 0.0  # switching error to wider formats at the end, mean
    narrower: float = 0.0


class Data:
    """Digits to train on, and unseen ones."""

    def __init__(self) -> None:
        source = mpq.open_source("tiny-cnn", nsamples=768, batch_size=768, evaluation_samples=768)
        (self.images, self.labels), (self.unseen, self.answers) = (
            source.calibration[0],
            (torch.cat(parts) for parts in zip(*source.evaluation, strict=True)),
        )

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The same batch for every run of a seed."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=seeded(seed, "batch", step))
        return self.images[chosen], self.labels[chosen]

    @torch.no_grad()
    def judge(self, model: nn.Module, count: int | None = None) -> tuple[float, float]:
        """Accuracy and loss on unseen digits, the first `count` or all."""
        model.eval()
        logits, answers = model(self.unseen[:count]), self.answers[:count]
        model.train()
        accuracy = (logits.argmax(1) == answers).float().mean().item()
        return accuracy, functional.cross_entropy(logits, answers).item()


Builder: TypeAlias = Callable[[], nn.Module]
NETWORKS: dict[str, Builder] = {"cnn": BUNDLED["tiny-cnn"].build, "vit": SmallViT}


def with_seed(build: Builder, seed: int) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(seed)
    return build().train()


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module, scales: Sequence[nn.Parameter], steps: int) -> tuple[torch.optim.Optimizer, object]:
    optimizer = torch.optim.Adam([*model.parameters(), *scales], lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def sampled_steps(search: OneShot, model: nn.Module, data: Data, seed: int, steps: int) -> Iterator[int]:
    """Train a model and its search step by step; yields each step when it is done."""
    optimizer, decay = optimizer_of(model, list(search.parameters()), steps)
    for step in range(steps):
        inputs, labels = data.batch(seed, step)
        with search.sample():
            loss = functional.cross_entropy(model(inputs), labels)
        step_of(model, optimizer, loss)
        decay.step()  # type: ignore[attr-defined]
        search.update(quality=-loss.item())
        yield step


def searched(data: Data, build: Builder, schedule: Schedule, cost: str, seed: int, steps: int) -> Measured:
    """A one-shot search."""
    model = with_seed(build, seed)
    target = share_of(data, build, cost)
    schedule = replace(schedule, steps=round(LEARNING * steps), rate=0.2, cost_weight=2.0)
    search = OneShot(model, SPACE, cost, target, learned=True, seed=seed, schedule=schedule)
    early = 0.0
    for step in sampled_steps(search, model, data, seed, steps):
        if step == steps // 4:
            errors = search.switching_errors(lambda: data.judge(model, FEW)[1])
            early = float(errors[errors != 0].mean())
    with search.chosen() as schemes:
        accuracy, loss_at_end = data.judge(model)
    best = np.array([SPACE.index(scheme.name) for scheme in schemes])
    errors = search.switching_errors(lambda: data.judge(model, FEW)[1])
    options = np.arange(len(SPACE))
    allocation = search.allocation().provenance
    groups = np.array([best[group[0]] for group in search.groups])
    wider = errors[options[None] > groups[:, None]]
    narrower = errors[options[None] < groups[:, None]]
    switching = (float(part.mean()) if part.size else 0.0 for part in (wider, narrower))
    costs = (allocation["likeliest_over_target"], allocation["cost_over_target"])
    return Measured(accuracy, loss_at_end, allocation["entropy"], *costs, early, *switching)


def share_of(data: Data, build: Builder, cost: str) -> float:
    """What the uniform format costs, as a share of the widest."""
    model = with_seed(build, 0)
    search = OneShot(model, SPACE, cost, 1.0)
    with torch.no_grad(), search.sample():
        model(data.images[:1])
    uniform = search.cost_of(np.full(len(search.groups), SPACE.index(UNIFORM)))
    search.close()
    return uniform


def uniform(data: Data, model: nn.Module, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy and loss of the uniform format, trained as long."""
    layers, scheme = find_layers(model), parse_scheme(UNIFORM)
    quantization = FakeQuantization(model, layers, learned=[scheme.weight])
    quantization.use({layer.name: scheme for layer in layers})
    optimizer, decay = optimizer_of(model, list(quantization.parameters()), steps)
    for step in range(steps):
        inputs, labels = data.batch(seed, step)
        step_of(model, optimizer, functional.cross_entropy(model(inputs), labels))
        decay.step()  # type: ignore[attr-defined]
    return data.judge(model)


def print_row(name: str, runs: Sequence[Measured]) -> None:
    """Print a row of the table: means over seeds."""
    fields = ("accuracy", "loss", "entropy", "likeliest", "cost", "early", "wider", "narrower")
    means = [statistics.mean(getattr(run, field) for run in runs) for field in fields]
    spread = statistics.stdev(run.loss for run in runs) if len(runs) > 1 else float("nan")
    print(
        f"| {name} | {100 * means[0]:.1f} % | {means[1]:.4f} +- {spread:.3f} | "
        + " | ".join(f"{mean:.3f}" for mean in means[2:]) + " |",
        flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, two schedules and costs")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="cnn")
    parser.add_argument("--schedules", nargs="+", choices=tuple(SCHEDULES), help="these alone, and no other costs")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    seeds, steps = options.seeds or (1 if options.quick else 3), options.steps or (40 if options.quick else 400)
    data, build = Data(), NETWORKS[options.network]
    schedules = options.schedules or list(SCHEDULES)[: 2 if options.quick else None]
    costs = [] if options.schedules else [name for name in COSTS if name != "bitops"][: 1 if options.quick else None]
    print(
        "| run | accuracy | loss | entropy | likeliest / target | cost / target | switching, early | wider | narrower |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print_row(
        f"uniform {UNIFORM.split('-')[0]}",
        [Measured(*uniform(data, with_seed(build, seed), seed, steps)) for seed in range(seeds)],
    )
    found = {}
    for name in schedules:
        found[name] = [searched(data, build, SCHEDULES[name], "bitops", seed, steps) for seed in range(seeds)]
        print_row(f"bitops, {name}", found[name])
    for cost in costs:
        print_row(
            f"{cost}, cosine", [searched(data, build, SCHEDULES["cosine"], cost, seed, steps) for seed in range(seeds)]
        )
    worst = max(run.cost for runs in found.values() for run in runs)
    print("\n" + result("fliqs_ablation_cost", worst, "<=1", worst <= 1 + 1e-9))
    if {"cosine", "none"} <= found.keys():
        certain, without = (statistics.mean(run.entropy for run in found[name]) for name in ("cosine", "none"))
        share = certain / max(without, 1e-9)
        print(result("fliqs_ablation_entropy_cosine_over_none", share, "<1", share < 1))


if __name__ == "__main__":
    main()
