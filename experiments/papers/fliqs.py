"""One-shot search on ResNet-20 from its pretrained weights, against a uniform format trained equally long.

Every run trains on the same batches (2,000 training images, flipped and shifted), with the same optimizer and learned
step sizes; the first and the last layer stay in floating point. A call stops after `--seconds`; an unfinished run
leaves a checkpoint, from which the next call resumes with identical results.

    python -m experiments.papers.fliqs [--kinds integer float] [--seeds 0 1 2] [--steps 2000] [--seconds 200]
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks import search_rows
from experiments.models import reference_models
from experiments.result import result
from mpq.core.files import write_atomically
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.search.controller import Schedule
from mpq.search.one_shot import OneShot
from mpq.training.fake import FakeQuantization

ENDS = ("conv1", "linear")
BATCH = 16
LEARNING = 0.6  # share of the steps until the entropy schedule ends; the weights settle in the rest
QUALITY = 3.0  # factor of minus the loss: good and bad formats then differ by about 1


@dataclass(frozen=True)
class Contest:
    """Candidate schemes, the uniform one whose bit operations are the target, and the policy's settings."""

    space: tuple[str, ...]
    uniform: str
    rate: float
    cost_weight: float

    @property
    def target(self) -> float:
        """Target as a share of the bit operations of the costliest scheme."""
        costs = {name: _bits(name) ** 2 for name in self.space}
        return _bits(self.uniform) ** 2 / max(costs.values())


def _bits(scheme: str) -> int:
    return parse_scheme(scheme).weight.grid.bits


INTEGERS = tuple(f"int{bits}-channel+a:uint{bits}" for bits in (3, 4, 6, 8))  # inputs come from a ReLU
FLOATS = tuple(f"{name}-channel+a:{name}" for name in ("fp4-e2m1", "fp5-e2m2", "fp6-e3m2", "fp8-e4m3"))
CONTESTS = {
    "integer": Contest(INTEGERS, INTEGERS[1], rate=0.08, cost_weight=3.0),
    "float": Contest(FLOATS, FLOATS[1], rate=0.04, cost_weight=2.0),
}


class Run:
    """A training of one model, searched or uniform."""

    def __init__(self, contest: Contest, searched: bool, steps: int, seed: int) -> None:
        self.steps, self.seed, self.step = steps, seed, 0
        self.model = reference_models.resnet(20).train()
        self.search: OneShot | None = None
        if searched:
            self.search = OneShot(
                self.model, contest.space, "bitops", contest.target, exclude=ENDS, learned=True, seed=seed,
                schedule=Schedule(
                    steps=max(1, round(LEARNING * steps)), rate=contest.rate, cost_weight=contest.cost_weight
                ),
            )  # fmt: skip
            self.quantization = self.search.quantization
        else:
            layers, scheme = find_layers(self.model, exclude=ENDS), parse_scheme(contest.uniform)
            self.quantization = FakeQuantization(self.model, layers, learned=[scheme.weight])
            self.quantization.use({layer.name: scheme for layer in layers})
        parameters = [*self.model.parameters(), *self.quantization.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def train(self, images: Tensor, labels: Tensor, deadline: float) -> bool:
        """Train to the end or until `time.time()` passes the deadline; return whether the end was reached."""
        while self.step < self.steps:
            if time.time() > deadline:
                return False
            inputs, wanted = augmented(images, labels, self.seed, self.step)
            loss = self._loss(inputs, wanted)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.decay.step()
            if self.search is not None:
                self.search.update(quality=-QUALITY * loss.item())
            self.step += 1
        return True

    def _loss(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        if self.search is None:
            return nn.functional.cross_entropy(self.model(inputs), wanted)
        with self.search.sample():
            return nn.functional.cross_entropy(self.model(inputs), wanted)

    @torch.no_grad()
    def measured(self, batches: tuple[tuple[Tensor, Tensor], ...]) -> dict[str, float]:
        """Top-1 in percent and loss in evaluation mode, in the final formats."""
        self.model.eval()
        if self.search is None:
            return _measured(self.model, batches)
        with self.search.chosen():
            return _measured(self.model, batches)

    def state_dict(self) -> dict[str, Any]:
        """The training state."""
        held: Any = self.search or self.quantization
        parts = {"model": self.model, "held": held, "optimizer": self.optimizer, "decay": self.decay}
        return {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        if self.search is not None:  # counts multiplications as the first step did
            with torch.no_grad(), self.search.sample():
                self.model(torch.zeros(1, 3, 32, 32))
        held: Any = self.search or self.quantization
        self.step = state["step"]
        for name, part in (("model", self.model), ("held", held), ("optimizer", self.optimizer), ("decay", self.decay)):
            part.load_state_dict(state[name])


def _measured(model: nn.Module, batches: tuple[tuple[Tensor, Tensor], ...]) -> dict[str, float]:
    loss = sum(float(nn.functional.cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return {"top1": 100 * reference_models.top1(model, batches), "loss": loss / sum(len(y) for _, y in batches)}


def augmented(images: Tensor, labels: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A random batch, flipped and shifted by up to 4 pixels; it depends on seed and step alone."""
    generator = seeded(seed, "augmentation", step)
    picked = torch.randint(len(images), (BATCH,), generator=generator)
    y, x = torch.randint(9, (2,), generator=generator).tolist()
    batch = nn.functional.pad(images[picked], (4, 4, 4, 4))[:, :, y : y + 32, x : x + 32]
    flip = torch.rand(BATCH, generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), batch.flip(3), batch), labels[picked]


def continued(run: Run, checkpoint: Path, deadline: float) -> bool:
    """Resume training until the deadline at most; return whether the run has ended."""
    if checkpoint.exists():
        run.load_state_dict(torch.load(checkpoint, weights_only=True))
    ended = run.train(*reference_models.cifar10_calibration(2000, 2000)[0], deadline)
    with write_atomically(checkpoint) as draft, draft.open("wb") as stream:
        torch.save(run.state_dict(), stream)
    return ended


def work(kinds: Sequence[str], seeds: Sequence[int], steps: int, deadline: float, folder: Path, results: Path) -> bool:
    """Train the runs missing from the results until the deadline; return whether all are done."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, kind, way in product(seeds, kinds, ("searched", "uniform")):
        if ("fliqs", kind, way, seed) in search_rows.read(results):
            continue
        run = Run(CONTESTS[kind], way == "searched", steps, seed)
        start = time.time()
        if not continued(run, folder / f"{kind}-{way}-{seed}-{steps}.pt", deadline):
            print(f"{kind} {way} seed {seed}: step {run.step} of {steps}", flush=True)
            return False
        measures = run.measured(reference_models.cifar10_test(250))
        described = CONTESTS[kind].uniform
        if run.search is not None:
            facts = run.search.allocation().provenance
            measures |= {"cost_error": abs(facts["cost_over_target"] - 1), "entropy": facts["entropy"]}
            described = " ".join(name.split("-")[0] for name in run.search.allocation().schemes)
        search_rows.append(results, "fliqs", kind, way, seed, measures)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
        print(f"{kind} {way} seed {seed}: {figures}; {time.time() - start:.0f} s; {described}", flush=True)
    return True


def report(rows: search_rows.Rows) -> list[str]:
    """Print the table of all runs; return the RESULT lines."""
    lines = []
    for kind, contest in CONTESTS.items():
        pairs = [
            (rows["fliqs", kind, "searched", seed], rows["fliqs", kind, "uniform", seed])
            for seed in sorted({key[3] for key in rows if key[:2] == ("fliqs", kind)})
            if {("fliqs", kind, way, seed) for way in ("searched", "uniform")} <= rows.keys()
        ]
        if not pairs:
            continue
        gains = np.array([searched["top1"] - uniform["top1"] for searched, uniform in pairs])
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        print(f"\nFLIQS, {kind}, against {contest.uniform} at equal bit operations; top-1 of 1,000 test images, loss")
        for searched, uniform in pairs:
            print(
                f"  searched {searched['top1']:.1f} % {searched['loss']:.4f}, uniform {uniform['top1']:.1f} % "
                f"{uniform['loss']:.4f}; cost off by {100 * searched['cost_error']:.1f} %, entropy "
                f"{searched['entropy']:.3f}"
            )
        print(f"  gain {gains.mean():+.2f} +- {error:.2f} points over {len(gains)} seeds")
        alone = [row for key, row in rows.items() if key[:3] == ("fliqs", kind, "searched")]
        worst = {name: max(row[name] for row in alone) for name in ("cost_error", "entropy")}
        gain = round(float(gains.mean()), 6)  # equal sums may differ by a rounding error
        label = f"search_fliqs_resnet20_{kind}"
        lines += [
            result(f"{label}_gain_points", gain, ">=0", gain >= 0),
            result(f"{label}_cost_error", worst["cost_error"], "<0.03", worst["cost_error"] < 0.03),
            result(f"{label}_entropy", worst["entropy"], "<0.05", worst["entropy"] < 0.05),
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only report what is in the results")
    parser.add_argument("--kinds", nargs="+", choices=tuple(CONTESTS), default=tuple(CONTESTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be called again")
    parser.add_argument("--checkpoints", type=Path, default=Path("fliqs-unfinished"), help="folder for unfinished runs")
    parser.add_argument("--results", type=Path, default=search_rows.RESULTS)
    options = parser.parse_args()
    if not options.quick:
        deadline = time.time() + options.seconds
        work(options.kinds, options.seeds, options.steps, deadline, options.checkpoints, options.results)
    print("\n" + "\n".join(report(search_rows.read(options.results))))


if __name__ == "__main__":
    main()
