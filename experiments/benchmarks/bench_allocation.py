"""Searched allocations against uniform formats, simple rules and random ones: equal bytes, equal rounding, unseen data.

    python -m experiments.benchmarks.bench_allocation [--quick] [--models resnet20 llama5m] [--bits 3.04]
        [--metric fisher]

Budgets are the sizes of uniform int4, int3 and int2, and 2.5, 2.75 and 3.5 bits. Every contestant gets at most the
budget's bytes and the same rounding; running means of batch normalization are re-estimated for each where that helps on
acceptance data. Reported: mean KL divergence from the original on held-out data, with the standard error of the paired
difference to ours. RESULT lines give the difference to the best contestant.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.models import reference_models
from experiments.result import result
from mpq.acceptance import accept, candidate_of
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import Choices
from mpq.evaluation import Quality
from mpq.judge import random_choices
from mpq.measuring import Measurer, store_for
from mpq.network.calibration import Batch, cross_entropy, next_token_loss
from mpq.search import frontier_of
from mpq.search.rules import rules
from mpq.sensitivity import DEFAULT_METRIC
from mpq.sensitivity.profile import profile
from mpq.sources import Source

WIDTHS = (2, 3, 4, 5, 6, 8)
RULES = ("ends first", "outer blocks first")
BETWEEN = (2.5, 2.75, 3.5)  # bits, beside the sizes of uniform int2, int3 and int4


@dataclass(frozen=True)
class Contest:
    """A model with its data, and how its formats share scales."""

    source: Source
    sharing: str  # "channel", "g64"
    method: str

    @property
    def formats(self) -> tuple[str, ...]:
        """Candidate formats, small to large."""
        return tuple(f"int{width}-{self.sharing}" for width in WIDTHS)


def images(name: str, model: torch.nn.Module, seen: Sequence[Batch], unseen: Sequence[Batch]) -> Source:
    """The first half of the seen images is for calibration, the second for acceptance."""
    half = len(seen) // 2
    parts = tuple(seen[:half]), tuple(unseen)
    return Source(name, model, *parts, cross_entropy, "accuracy", acceptance=tuple(seen[half:]))


def resnet(depth: int, quick: bool) -> Contest:
    """A CIFAR-10 ResNet, rounded to nearest by channel."""
    seen = reference_models.cifar10_calibration(256 if quick else 1024, 64)
    unseen = reference_models.cifar10_test(100)
    source = images(f"resnet{depth}", reference_models.resnet(depth), seen, unseen[:4] if quick else unseen)
    return Contest(source, "channel", "nearest")


def efficientnet(quick: bool) -> Contest:
    """EfficientNet-Lite0, clip search by channel."""
    seen = reference_models.imagenet_sample(0, 128 if quick else 448, 32)
    unseen = reference_models.imagenet_sample(500, 96 if quick else 480, 32)
    return Contest(images("efficientnet-lite0", reference_models.efficientnet_lite0(), seen, unseen), "channel", "mse")


def llama5m(quick: bool) -> Contest:
    """The small Llama, GPTQ, groups of 64."""
    count = 4 if quick else 16
    train = reference_models.wikitext_tokens("train", 3 * count).split(4)
    unseen = reference_models.wikitext_tokens("test", 2 * count).split(4)
    source = Source(
        "llama5m", reference_models.wikitext_llama(), train[: count // 2], unseen, next_token_loss, "perplexity",
        acceptance=train[count // 2 :],
    )  # fmt: skip
    return Contest(source, "g64", "gptq")


def smollm2(quick: bool) -> Contest:
    """SmolLM2-135M off its 4-bit lattice, GPTQ, groups of 64."""
    sys.path.insert(0, str(reference_models.DATA))
    import zipfile

    from smollm2 import load

    model, tokenizer = load()
    count = 2 if quick else 8
    with zipfile.ZipFile(reference_models.data_file("texts.zip")) as archive:
        texts = [archive.read(f"wikitext2_{name}.txt").decode()[:400_000] for name in ("train", "raw_test")]
    train, unseen = (torch.tensor(tokenizer(text)["input_ids"])[: 256 * 6 * count].view(-1, 256) for text in texts)
    calibration, held = train[: 4 * count].split(4), train[4 * count : 6 * count].split(4)
    source = Source(
        "smollm2", model, calibration, unseen[: 4 * count].split(4), next_token_loss, "perplexity", acceptance=held
    )  # fmt: skip
    return Contest(source, "g64", "gptq")


MODELS: dict[str, Callable[[bool], Contest]] = {
    "resnet20": lambda quick: resnet(20, quick),
    "resnet56": lambda quick: resnet(56, quick),
    "efficientnet": efficientnet,
    "llama5m": llama5m,
    "smollm2": smollm2,
}


@dataclass(frozen=True)
class Result:
    """Measured quality of one contestant at one budget."""

    name: str
    allocation: Allocation
    quality: Quality

    @property
    def kl(self) -> float:
        """Mean divergence from the original."""
        return self.quality.harm_with_error()[0]

    def __str__(self) -> str:
        kl, error = self.quality.harm_with_error()
        return f"{self.name:20} {self.allocation.bits:6.3f} bits  KL {kl:.4g} +- {error:.1g}  {self.quality}"


def contest(frontier: Frontier, bits: float, measurer: Measurer, efforts: Sequence[str], draws: int) -> list[Result]:
    """Every contestant at one budget, ours first."""
    problem = frontier.problem
    size = bits * problem.weights / 8
    random = np.random.default_rng(0)
    others = {name: problem.allocation(choices) for name, choices in rules(problem, size).items()}
    for draw in range(draws):
        others[f"random {draw}"] = problem.allocation(random_choices(problem, bits, random))
    others["reversed"] = problem.allocation(_reversed(frontier, size))
    for name, allocation in problem.uniform():
        if 0.97 * size <= allocation.size <= size:
            others[f"all {name}"] = allocation
    others["table alone"] = frontier.at(bits=bits)
    results = []
    for effort in efforts:
        start = time.process_time()
        accepted = accept(frontier, size, measurer, effort=effort)
        seconds = time.process_time() - start
        chosen = accepted.chosen
        print(f"  {effort}: {chosen.name}, {seconds:.0f} CPU s; {accepted.verdict()}")
        quality = measurer.quality(chosen.allocation, "evaluation", chosen.means)
        results.append(Result(f"ours, {effort}", chosen.allocation, quality))
    for name, allocation in others.items():
        candidate = candidate_of(name, allocation, measurer)
        if candidate is not None:
            quality = measurer.quality(allocation, "evaluation", candidate.means)
            results.append(Result(name, allocation, quality))
    return results


def _reversed(frontier: Frontier, size: float) -> Choices:
    """The optimum's choices assigned to the groups in reverse order, lowered from the end until they fit."""
    problem = frontier.problem
    choices = np.asarray(frontier.choices[frontier.index_at(cost=size)], dtype=np.intp)[::-1].copy()
    costs, groups = problem.costs["size"], np.arange(len(choices))
    for group in reversed(groups.tolist()):
        if costs[groups, choices].sum() > size:
            choices[group] = 0
    return choices


def _report(where: str, ours: Result, others: Sequence[Result], between: bool, small: bool) -> bool:
    """Print the RESULT lines of one budget: KL against the best contestant, the best simple rule and uniform formats.

    Returns whether ours is within 2 % or two paired standard errors of the best. Goals `between` uniform sizes: 10 %
    less KL than the best simple rule; for `small` networks with scales by channel, a third less than uniform formats.
    """
    best = min(others, key=lambda one: one.kl)
    difference, error = ours.quality.harm_above(best.quality)
    goal = max(0.02, 2 * error / best.kl)
    lines = [(f"over_best ({best.name})", difference / best.kl, goal, difference / best.kl <= goal)]
    uniform = [one.kl for one in others if one.name.startswith("all ")]
    if uniform:
        least = 1 / 3 if small else 0.0
        lines.append(("under_uniform", 1 - ours.kl / min(uniform), least, 1 - ours.kl / min(uniform) >= least))
    ruled = [one.kl for one in others if one.name in RULES]
    if between and ruled:
        lines.append(("under_rules", 1 - ours.kl / min(ruled), 0.1, 1 - ours.kl / min(ruled) >= 0.1))
    for what, value, wanted, fine in lines:
        print(result(f"{where}/{what}", value, f"{wanted:.3f}", fine), flush=True)
    return lines[0][-1]


def run(name: str, options: argparse.Namespace) -> bool:
    """Run one model at every budget; return whether ours was never behind."""
    posed = MODELS[name](options.quick)
    source = posed.source
    start = time.process_time()
    table = profile(
        source.model, source.calibration, source.loss_fn, posed.formats, metric=options.metric, method=posed.method,
        progress=False,
    )  # fmt: skip
    print(
        f"\n{name}: metric {options.metric}, {posed.method}, profile {time.process_time() - start:.0f} CPU s",
        flush=True,
    )
    frontier = frontier_of(table)
    measurer = Measurer(source, store_for(posed.method, source, table.layers))
    uniform = {one: allocation.bits for one, allocation in frontier.uniform()}
    points = sorted([uniform[f"int{width}-{posed.sharing}"] for width in (2, 3, 4)] + list(BETWEEN))
    good = True
    for bits in options.bits or ([uniform[f"int3-{posed.sharing}"]] if options.quick else points):
        if not uniform[f"int2-{posed.sharing}"] <= bits:
            continue
        print(f"{name} at {bits:.3f} bits")
        results = contest(frontier, bits, measurer, options.efforts, 2 if options.quick else 5)
        for contestant in results:
            print(f"  {contestant}")
        ours, others = results[len(options.efforts) - 1], results[len(options.efforts) :]
        good &= _report(
            f"{name}/{bits:.3f}", ours, others, between=bits in BETWEEN, small=posed.sharing == "channel" and bits < 3.1
        )
    return good


def main() -> None:
    """Run the selected contests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 at one budget, little data, no polishing")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), help="default: all; two of them when quick")
    parser.add_argument("--metric", default=DEFAULT_METRIC)
    parser.add_argument("--efforts", nargs="+", help="the last one is ours in the RESULT lines")
    parser.add_argument("--bits", nargs="+", type=float, help="budgets, in place of those above")
    options = parser.parse_args()
    options.efforts = options.efforts or ["fast" if options.quick else "normal"]
    good = True
    for name in options.models or (("resnet20",) if options.quick else MODELS):
        try:
            good &= run(name, options)
        except (MpqError, FileNotFoundError) as error:
            print(f"{name} left out: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GB")
    print(result("never_behind", good, "=1", good))


if __name__ == "__main__":
    main()
