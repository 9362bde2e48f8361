"""Searching widths and kernels together with formats, against formats alone, at equal bit operations.

    python -m experiments.papers.fliqnas [--quick] [--seeds N] [--steps N]

A network of two inverted residuals (depthwise 5 x 5, expansion 6) on the bundled 8x8 digits, from random weights. At
the bit operations of the whole network in int3: uniform int3, formats searched in the whole network (FLIQS), and
formats, two expansions and two kernels searched together (FLIQNAS). All runs of a seed have the same batches,
optimizer, steps and learned step sizes; loss and accuracy of the final choice on unseen digits.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.papers.fliqs_ablation import SPACE, Data, sampled_steps, uniform
from experiments.result import result
from mpq.search.architecture import Choice, Kernel, Width
from mpq.search.controller import Schedule
from mpq.search.one_shot import OneShot


class Block(nn.Module):
    """Expansion, depthwise convolution, projection, and the input added: (n, c, h, w) -> the same."""

    def __init__(self, channels: int, expansion: int = 6) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.norm2 = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.relu6(self.norm2(self.depthwise(functional.relu6(self.norm1(self.expand(x))))))
        out: Tensor = x + self.norm3(self.project(wide))
        return out


class Net(nn.Module):
    """(n, 1, 8, 8) -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first, self.second = Block(16), Block(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = self.second(functional.avg_pool2d(self.first(x), 2))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


ARCHITECTURE: tuple[Choice, ...] = tuple(
    choice
    for name in ("first", "second")
    for choice in (
        Width(
            (f"{name}.expand", f"{name}.depthwise"), (f"{name}.project",), (1 / 3, 2 / 3, 1.0),
            (f"{name}.norm1", f"{name}.norm2"),
        ),
        Kernel(f"{name}.depthwise", (3, 5)),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements of a run."""

    accuracy: float
    loss: float
    cost: float
    choice: str


def run(data: Data, way: str, seed: int, steps: int) -> Measured:
    """Train one way: "uniform", "fliqs" or "fliqnas"."""
    torch.manual_seed(seed)
    model = Net().train()
    if way == "uniform":
        return Measured(*uniform(data, model, seed, steps), 1.0, "int3")
    search = OneShot(
        model, SPACE, "bitops", (3 / 8) ** 2, learned=True, seed=seed,
        architecture=ARCHITECTURE if way == "fliqnas" else (),
        schedule=Schedule(steps=round(0.7 * steps), rate=0.2, cost_weight=2.0, entropy_weight=0.2),
    )  # fmt: skip
    for _ in sampled_steps(search, model, data, seed, steps):
        pass
    with search.chosen() as schemes:
        judged = data.judge(model)
    allocation = search.allocation()
    bits = " ".join(str(scheme.weight.grid.bits) for scheme in schemes)
    shapes = " ".join(f"{layer.rows}x{layer.cols}" for layer in allocation.layers)
    return Measured(*judged, allocation.provenance["cost_over_target"], f"bits {bits}; matrices {shapes}")


def compared(name: str, ours: Sequence[Measured], theirs: Sequence[Measured]) -> str:
    """The RESULT line: mean reduction of the loss, paired by seed."""
    gains = [other.loss - own.loss for own, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    mean = statistics.mean(gains)
    return result(name, mean, ">=0", mean >= 0, f"(+- {error:.4f} over {len(gains)} seeds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    seeds, steps = options.seeds or (1 if options.quick else 3), options.steps or (30 if options.quick else 400)
    data, runs = Data(), {"uniform": [], "fliqs": [], "fliqnas": []}  # type: ignore[var-annotated]
    for seed in range(seeds):
        for way, found in runs.items():
            found.append(run(data, way, seed, steps))
            last = found[-1]
            print(
                f"seed {seed}, {way}: accuracy {100 * last.accuracy:.1f} %, loss {last.loss:.4f}, cost {last.cost:.3f} "
                f"of the target; {last.choice}",
                flush=True,
            )
    print()
    print(compared("fliqnas_gain_over_fliqs", runs["fliqnas"], runs["fliqs"]))
    print(compared("fliqnas_gain_over_uniform", runs["fliqnas"], runs["uniform"]))
    print(compared("fliqs_gain_over_uniform", runs["fliqs"], runs["uniform"]))


if __name__ == "__main__":
    main()
