"""One-shot search on a small MobileNet against rules, a softmax search and the exact search's allocation.

    python -m experiments.papers.fliqs_mobilenet [--quick] [--seeds N] [--steps N] [--targets 3 4]

The network is trained in floating point on the 9,000 JPEG images of CIFAR-10's test set that are no copies of the 1,000
lossless ones; then every method trains it for the same steps, on the same batches, with the same optimizer and learned
step sizes, at the bit operations of a uniform format, and is judged on the 1,000. Formats: integers of 2 to 8 bits and
fp4 to fp8, of weights and inputs. "Choice trained" trains FLIQS's choice from the start for all steps: its loss against
other methods is due to the choice, its gain over FLIQS is the price of sampling during training.
"""

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import mpq
from experiments.models.small_mobilenet import BLOCKS, Data, trained
from experiments.models.softmax_formats import SoftmaxFormats
from experiments.result import result
from mpq.core.costs import bitops
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.network.calibration import cross_entropy
from mpq.network.layers import find_layers
from mpq.network.macs import count_macs
from mpq.search.architecture import Choice, Width
from mpq.search.controller import Schedule
from mpq.search.one_shot import OneShot
from mpq.search.repair import likeliest_within
from mpq.training.fake import FakeQuantization

INTEGERS = tuple(f"int{bits}-channel+a:int{bits}-token" for bits in (2, 3, 4, 6, 8))
FLOATS = tuple(f"{name}-channel+a:{name}-token" for name in ("fp4-e2m1", "fp6-e3m2", "fp8-e4m3"))
SPACE = tuple(parse_scheme(name) for name in (*INTEGERS, *FLOATS))
SETTLING = 0.3  # share of a search's steps in its final choice
WAYS = ("uniform", "ends at 8 bits", "exact", "softmax", "fliqs", "choice trained", "fliqnas")
WIDTHS: tuple[Choice, ...] = tuple(
    Width(
        (f"blocks.{i}.expand", f"blocks.{i}.depthwise"), (f"blocks.{i}.project",), (0.5, 0.75, 1.0),
        (f"blocks.{i}.norm1", f"blocks.{i}.norm2"),
    )
    for i in range(len(BLOCKS))
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements of a run."""

    accuracy: float
    loss: float
    cost: float  # over the target
    bits: str


class Contest:
    """One start and one target: every method from the same weights."""

    def __init__(self, data: Data, start: nn.Module, seed: int, steps: int, bits: int) -> None:
        self.data, self.start, self.seed, self.steps = data, start, seed, steps
        self.uniform = SPACE[[2, 3, 4].index(bits)]
        images = data.images[:2]
        self.layers = count_macs(start, find_layers(start), images, lambda model, batch: model(batch))
        self.costs = np.array([[bitops(scheme, layer.macs) for scheme in SPACE] for layer in self.layers])
        self.budget = float(self.costs[:, SPACE.index(self.uniform)].sum())
        self.fliqs_choice: Mapping[str, Scheme] = {}

    def run(self, way: str) -> Measured:
        """Train and judge one method."""
        if way in ("fliqs", "fliqnas"):
            return self._sampled(WIDTHS if way == "fliqnas" else ())
        model = copy.deepcopy(self.start)
        if way == "softmax":
            searched = round((1 - SETTLING) * self.steps)
            return self._settled(model, self._softmax(model, searched), searched)
        chosen = {
            "uniform": lambda: dict.fromkeys((layer.name for layer in self.layers), self.uniform),
            "ends at 8 bits": self._ends,
            "exact": self._exact,
            "choice trained": lambda: self.fliqs_choice,
        }[way]()
        return self._settled(model, chosen, 0)

    def _ends(self) -> Mapping[str, Scheme]:
        """8 bits for first and last layer; between them one width, the next one for the first layers while it fits."""
        levels = [4, *[0] * (len(self.layers) - 2), 4]
        rows = np.arange(len(levels))
        for level in range(1, 5):
            for index in range(1, len(levels) - 1):
                raised = [*levels[:index], level, *levels[index + 1 :]]
                if self.costs[rows, raised].sum() <= self.budget:
                    levels = raised
        return {layer.name: SPACE[level] for layer, level in zip(self.layers, levels, strict=True)}

    def _exact(self) -> Mapping[str, Scheme]:
        """The optimum of the default metric's table."""
        batches = [self.data.batch(self.seed + 2000, step) for step in range(4)]
        table = mpq.profile(
            self.start, batches, cross_entropy, [scheme.name for scheme in SPACE], progress=False, seed=self.seed
        )
        found = mpq.allocate(table, bits=16.0, budgets={"bitops": self.budget}).allocation
        return found.scheme_of

    def _softmax(self, model: nn.Module, steps: int) -> Mapping[str, Scheme]:
        """A differentiable search: cross-entropy plus the distance of the expected cost from the target."""
        mixture = SoftmaxFormats(model, self.layers, SPACE, self.costs / self.budget)
        groups = [{"params": list(model.parameters())}, {"params": [mixture.logits], "lr": 3e-2}]
        optimizer = torch.optim.Adam(groups, lr=1e-3)
        for step in range(steps):
            images, labels = self.data.batch(self.seed, step)
            loss = functional.cross_entropy(model(images), labels) + 2 * (mixture.expected_cost() - 1).abs()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        mixture.remove()
        best = likeliest_within(mixture.log_probabilities(), self.costs, self.budget)
        return {layer.name: SPACE[choice] for layer, choice in zip(self.layers, best, strict=True)}

    def _settled(self, model: nn.Module, schemes: Mapping[str, Scheme], begun: int) -> Measured:
        """Train in these schemes for the rest of the steps."""
        quantization = FakeQuantization(model, self.layers, learned=[scheme.weight for scheme in schemes.values()])
        quantization.use(schemes)
        optimizer = torch.optim.Adam([*model.parameters(), *quantization.parameters()], lr=1e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps - begun)
        for step in range(begun, self.steps):
            images, labels = self.data.batch(self.seed, step)
            functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        cost = sum(bitops(schemes[layer.name], layer.macs) for layer in self.layers) / self.budget
        found = Measured(*self.data.judge(model), cost, _bits_text(self.layers, schemes))
        quantization.remove()
        return found

    def _sampled(self, architecture: Sequence[Choice]) -> Measured:
        """FLIQS, or FLIQNAS with widths."""
        model = copy.deepcopy(self.start)
        search = OneShot(
            model, SPACE, "bitops", self.budget / float(self.costs.max(1).sum()), learned=True, seed=self.seed,
            architecture=architecture,
            schedule=Schedule(
                steps=round((1 - SETTLING) * self.steps), rate=0.1, cost_weight=2.0, entropy_weight=0.2
            ),
        )  # fmt: skip
        optimizer = torch.optim.Adam([*model.parameters(), *search.parameters()], lr=1e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for step in range(self.steps):
            images, labels = self.data.batch(self.seed, step)
            with search.sample():
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            search.update(quality=-loss.item())
        with search.chosen() as schemes:
            judged = self.data.judge(model)
        named = {layer.name: scheme for layer, scheme in zip(self.layers, schemes, strict=True)}
        facts = search.allocation()
        if not architecture:
            self.fliqs_choice = named
        search.close()
        kept = "" if not architecture else f", {sum(layer.params for layer in facts.layers)} weights"
        return Measured(*judged, facts.provenance["cost_over_target"], _bits_text(self.layers, named) + kept)


def _bits_text(layers: Sequence[Layer], schemes: Mapping[str, Scheme]) -> str:
    """Bits of each layer, floats marked."""
    formats = [schemes[layer.name].weight for layer in layers]
    return " ".join(f"{'f' if one.grid.family == 'float' else ''}{one.grid.bits}" for one in formats)


def report(bits: int, runs: Mapping[str, Sequence[Measured]]) -> list[str]:
    """Print the table of a target; return the RESULT lines: losses paired by seed."""
    print(f"\n| int{bits}'s bit operations | accuracy | loss | loss above fliqs's, paired | cost / target |")
    print("|---|---|---|---|---|")
    lines = []
    for way, found in runs.items():
        gaps = [other.loss - own.loss for other, own in zip(found, runs["fliqs"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        mean = statistics.mean(gaps)
        print(
            f"| {way} | {100 * statistics.mean(one.accuracy for one in found):.1f} % | "
            f"{statistics.mean(one.loss for one in found):.4f} | {mean:+.4f} +- {error:.4f} | "
            f"{statistics.mean(one.cost for one in found):.3f} |"
        )
        if way in ("uniform", "ends at 8 bits", "softmax", "exact"):
            name = f"fliqs_mobilenet_int{bits}_gain_over_{way.replace(' ', '_')}"
            lines.append(result(name, mean, f">{0}", mean > error, f"(+- {error:.4f} over {len(gaps)} seeds)"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, few images")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--start-steps", type=int, help="of the training in floating point (default: 1500)")
    parser.add_argument("--targets", type=int, nargs="+", choices=(2, 3, 4), default=(3, 4))
    options = parser.parse_args()
    seeds, steps = options.seeds or (1 if options.quick else 3), options.steps or (10 if options.quick else 300)
    data = Data(options.quick)
    targets = options.targets[:1] if options.quick else options.targets
    runs: dict[int, dict[str, list[Measured]]] = {bits: {way: [] for way in WAYS} for bits in targets}
    for seed in range(options.first_seed, options.first_seed + seeds):
        start = trained(data, seed, options.start_steps or (10 if options.quick else 1500))
        accuracy, loss = data.judge(start)
        print(f"seed {seed}, floating point: {100 * accuracy:.1f} %, loss {loss:.4f}", flush=True)
        for bits in targets:
            contest = Contest(data, start, seed, steps, bits)
            for way in WAYS:
                found = contest.run(way)
                runs[bits][way].append(found)
                print(
                    f"seed {seed}, int{bits}, {way}: {100 * found.accuracy:.1f} %, loss {found.loss:.4f}, cost "
                    f"{found.cost:.3f}; {found.bits}",
                    flush=True,
                )
    lines = [line for bits in targets for line in report(bits, runs[bits])]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
