"""Searched allocations against uniform formats of the same size: top-1 of ResNet-20, perplexity of a language model.

    python -m experiments.benchmarks.bench_quality [--quick] [--metric fisher] [--methods mse gptq]

Weight-only, post-training. Both are rounded by the same method; the searched allocation gets at most the uniform
format's bytes. Top-1 is over 1,000 images (standard error of one figure about 0.9 points), so the paired difference
with its standard error and the less noisy loss are printed beside it. RESULT lines come last.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mpq
from experiments.models import reference_models
from experiments.result import result
from mpq.network.calibration import Batch, cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.quantized import simulate
from mpq.rounding import METHODS
from mpq.sensitivity import DEFAULT_METRIC

LADDER = (
    "int2-g32", "int2-g64", "int2-g128", "int2-channel", "int3-g32", "int3-g64", "int3-g128", "int3-channel",
    "int4-g32", "int4-g64", "int4-g128", "int4-channel", "int5-g64", "int5-channel", "int6-g128", "int6-channel",
    "int8-channel",
)  # fmt: skip


@dataclass(frozen=True)
class Contest:
    """One model, its data, and the sizes at which searched and uniform are compared."""

    name: str
    model: nn.Module
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    kind: str  # "top1" or "perplexity"
    points: tuple[tuple[float, str], ...]  # (average bits, uniform format of that size)


@dataclass(frozen=True)
class Quality:
    """Per-sample results, so that two models can be compared in pairs."""

    losses: Tensor  # (samples,), of an image, or of a window's tokens
    correct: Tensor  # (samples,), empty for language models

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


@torch.inference_mode()
def measure(model: nn.Module, contest: Contest) -> Quality:
    losses, correct = [], []
    for batch in contest.evaluation:
        if contest.kind == "top1":
            inputs, labels = batch
            logits = model(inputs)
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            correct.append((logits.argmax(-1) == labels).float())
        else:
            logits = model(batch).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            losses.append(loss.mean(1))
    return Quality(torch.cat(losses), torch.cat(correct) if correct else torch.empty(0))


def paired_error(difference: Tensor) -> float:
    """Standard error of a mean of paired differences."""
    return (difference.std() / math.sqrt(len(difference))).item()


def run(contest: Contest, metric: str | None, methods: Sequence[str]) -> list[str]:
    results = []
    loss_fn = cross_entropy if contest.kind == "top1" else next_token_loss
    layers = find_layers(contest.model)
    start = time.perf_counter()
    table = mpq.profile(
        contest.model, contest.calibration, loss_fn, LADDER, metric=metric or DEFAULT_METRIC, progress=False
    )
    frontier = mpq.frontier(table)
    moments = None
    if any(METHODS[method].second_moment for method in methods):
        moments = second_moments(contest.model, layers, contest.calibration, loss_fn)
    uniforms = dict(frontier.uniform())
    original = measure(contest.model, contest)
    print(
        f"\n{contest.name}: profile and search {time.perf_counter() - start:.1f} s, metric {metric}; "
        f"{show(original, contest)} unquantized"
    )
    print(
        f"{'method':8} {'uniform':14} {'bits':>6} {'quality':>9} {'loss':>8}   {'searched':>6} {'quality':>9} "
        f"{'loss':>8}   gain"
    )
    for method in methods:
        for bits, format in contest.points:
            uniform = uniforms[format]
            allocation = frontier.at(bits=min(bits, uniform.bits) if bits != round(uniform.bits, 1) else uniform.bits)
            pair = []
            for choice in (uniform, allocation):
                simulated = simulate(contest.model, choice, method, moments, trainable=False)
                pair.append(measure(simulated, contest))
            plain, searched = pair
            gain, error = difference(plain, searched, contest)
            print(
                f"{method:8} {format:14} {uniform.bits:6.3f} {show(plain, contest):>9} {plain.loss:8.4f}   "
                f"{allocation.bits:6.3f} {show(searched, contest):>9} {searched.loss:8.4f}   {gain:+.2f} +- {error:.2f}"
            )
            results.append(result(f"{contest.name}_{method}_{bits}bits_gain", gain, ">0", gain > 0))
    return results


def show(quality: Quality, contest: Contest) -> str:
    if contest.kind == "top1":
        return f"{100 * quality.correct.mean().item():.1f} %"
    return f"{math.exp(quality.loss):.2f}"


def difference(plain: Quality, searched: Quality, contest: Contest) -> tuple[float, float]:
    """Improvement of the searched model and its standard error: top-1 points, or perplexity."""
    if contest.kind == "top1":
        pairs = 100 * (searched.correct - plain.correct)
        return pairs.mean().item(), paired_error(pairs)
    gain = math.exp(plain.loss) - math.exp(searched.loss)
    return gain, paired_error(plain.losses - searched.losses) * math.exp(searched.loss)


def contests(quick: bool) -> list[Contest]:
    calibration = reference_models.cifar10_calibration(256 if quick else 1024, batch_size=128)
    test = reference_models.cifar10_test(batch_size=250)
    found = [
        Contest(
            "resnet20", reference_models.resnet(20), calibration, test[:2] if quick else test, "top1",
            ((4.0, "int4-channel"), (3.0, "int3-channel"), (2.5, "int2-g32")),
        )
    ]  # fmt: skip
    windows = 16 if quick else 512
    found.append(
        Contest(
            "llama5m", reference_models.wikitext_llama(),
            reference_models.wikitext_tokens("train", 8 if quick else 64).split(8),
            reference_models.wikitext_tokens("test", windows).split(16), "perplexity",
            ((4.25, "int4-g64"), (3.25, "int3-g64"), (2.5, "int2-g32")),
        )
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and windows, under a minute")
    parser.add_argument("--metric", default=None, help="sensitivity metric (default: that of mpq.profile)")
    parser.add_argument("--methods", nargs="+", default=["mse", "gptq"])
    arguments = parser.parse_args()
    if not reference_models.DATA.exists():
        print("bench_quality: ../shared/data is absent, nothing to measure")
        return
    results = []
    for contest in contests(arguments.quick):
        results += run(contest, arguments.metric, arguments.methods)
    print("\n".join(results))


if __name__ == "__main__":
    main()
