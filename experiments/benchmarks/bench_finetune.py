"""How much of the loss from rounding fine-tuning under an allocation recovers, on held-out data.

    python -m experiments.benchmarks.bench_finetune [--quick] [--only NAME] [--steps N] [--seeds N]

ResNet-20 at the size of int2-channel and at 2.5 bits, trained on the 2,000 calibration images and their mirror images
and judged on the 1,000 test images; the 5 M parameter Llama at 2.5 bits, distilled on WikiText-2's training text and
judged on its test text; SmolLM2-135M likewise (hours on a CPU: only with `--only`). The recovered share is
(before - after) / (before - original) of the loss. HAWQ's order of stages is compared with its reverse on ResNet-20 at
2 bits, seed by seed.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mpq
from experiments.models.reference_models import (
    batched,
    cifar10_calibration,
    cifar10_test,
    resnet,
    smollm2,
    wikitext_llama,
)
from experiments.models.reference_models import wikitext_tokens as tokens
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.evaluation import Quality, Reference
from mpq.finetuning import Finetuned, finetune
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.sensitivity.eigenvalue import fine_tuning_order
from mpq.training.settings import Finetuning

FORMATS = ("int2-channel", "int3-channel", "int4-channel", "int8-channel")
GROUPS = ("int2-g64", "int3-g64", "int4-g64")


def uniform(model: nn.Module, scheme: str) -> Allocation:
    """Every layer in one scheme."""
    layers = find_layers(model)
    return Allocation(layers, (scheme,) * len(layers))


def searched(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, formats: Sequence[str]) -> Allocation:
    """The exact optimum of the default metric at 2.5 bits."""
    table = mpq.profile(model, batches[:4], loss_fn, formats, progress=False)
    return mpq.frontier(table).at(bits=2.5)


def images(seed: int, count: int) -> tuple[Batch, ...]:
    """Training images and their mirror images in a random order, batches of 64."""
    inputs, labels = (torch.cat(parts) for parts in zip(*cifar10_calibration(count), strict=True))
    inputs, labels = torch.cat([inputs, inputs.flip(3)]), torch.cat([labels, labels])
    order = torch.randperm(len(inputs), generator=seeded(seed, "bench_finetune"))
    return batched(inputs[order], labels[order], 64)


def report(name: str, original: Quality, before: Quality, result: Finetuned, after: Quality, seconds: float) -> float:
    """Print one run; return the recovered share of the loss."""
    share = (before.loss - after.loss) / (before.loss - original.loss)
    assert before.divergence is not None
    assert after.divergence is not None
    print(
        f"{name}: {original} -> {before} -> {after}; loss {original.loss:.4f}, {before.loss:.4f}, {after.loss:.4f} "
        f"({100 * share:.0f} % back); KL {before.divergence.mean()[0]:.4f} to {after.divergence.mean()[0]:.4f}; "
        f"{'kept' if result.kept else 'start kept'}, {len(result.losses)} steps of "
        f"{seconds / len(result.losses):.2f} s",
        flush=True,
    )
    return share


def one(
    name: str, model: nn.Module, allocation: Allocation, data: Sequence[Batch], unseen: Sequence[Batch],
    test: Sequence[Batch], kind: str, loss_fn: LossFn, settings: Finetuning,
) -> tuple[float, bool]:  # fmt: skip
    """Fine-tune; return the recovered share of the loss, and whether the KL divergence on test data is no worse."""
    reference = Reference(model, test, kind, loss_fn)
    before = reference.measure(mpq.simulate(model, allocation, trainable=False))
    begun = time.perf_counter()
    result = finetune(model, allocation, data, loss_fn, settings, acceptance=unseen)
    seconds = time.perf_counter() - begun
    after = reference.measure(result.model)
    return report(name, reference.quality, before, result, after, seconds), after.harm_above(before)[0] <= 0


def resnet20(steps: int, seeds: int, count: int, test: Sequence[Batch]) -> list[str]:
    """ResNet-20 at two sizes."""
    model, lines = resnet(20), []
    cases = {"int2": uniform(model, "int2-channel"), "2.5bits": searched(model, images(0, 256), cross_entropy, FORMATS)}
    for case, allocation in cases.items():
        runs = []
        for seed in range(seeds):
            *data, first, second = images(seed, count)
            settings = Finetuning(steps=steps, lr=1e-3, seed=seed)
            name = f"resnet20/{case} seed {seed}"
            runs.append(one(name, model, allocation, data, (first, second), test, "accuracy", cross_entropy, settings))
        lines.append(over_seeds(f"finetune_share/resnet20/{case}", [share for share, _ in runs], 0.8))
        lines.append(over_seeds(f"finetune_no_worse/resnet20/{case}", [float(fine) for _, fine in runs], 1.0))
    return lines


def llama5m(steps: int, seeds: int, windows: int, tested: int) -> list[str]:
    """The small Llama at 2.5 bits."""
    return language_model("llama5m", wikitext_llama(), tokens("train", windows), tokens("test", tested), steps, seeds)


def smollm2_135m(steps: int, seeds: int, windows: int, tested: int) -> list[str]:
    """SmolLM2-135M at 2.5 bits, judged on windows of the training text that distillation does not use."""
    model, text = smollm2(windows + tested)
    return language_model("smollm2", model, text[:windows], text[windows:], steps, seeds)


def language_model(name: str, model: nn.Module, train: Tensor, unseen: Tensor, steps: int, seeds: int) -> list[str]:
    """A language model at 2.5 bits, distilled on windows of tokens and judged on unseen ones."""
    test, runs = unseen.split(4), []
    allocation = searched(model, train[:16].split(4), next_token_loss, GROUPS)
    for seed in range(seeds):
        order = torch.randperm(len(train), generator=seeded(seed, "bench_finetune"))
        *data, first, second = train[order].split(4)
        settings = Finetuning(steps=steps, lr=1e-3, seed=seed)
        title = f"{name}/{allocation.bits:.2f} bits seed {seed}"
        held_out = (first, second)
        runs.append(one(title, model, allocation, data, held_out, test, "perplexity", next_token_loss, settings))
    return [
        over_seeds(f"finetune_share/{name}/2.5bits", [share for share, _ in runs], 0.5),
        over_seeds(f"finetune_no_worse/{name}/2.5bits", [float(fine) for _, fine in runs], 1.0),
    ]


def in_stages(steps: int, seeds: int, count: int, test: Sequence[Batch], stages: int = 5) -> list[str]:
    """HAWQ's order against its reverse and against all at once, ResNet-20 at 2 bits: mean KL on the test images."""
    model = resnet(20)
    allocation, reference = uniform(model, "int2-channel"), Reference(model, test, "accuracy")
    order = fine_tuning_order(model, allocation, images(0, 256), cross_entropy)
    found: dict[str, list[float]] = {"hawq": [], "reversed": [], "at once": []}
    for seed in range(seeds):
        *data, unseen = images(seed, count)
        for name, harms in found.items():
            given = tuple(reversed(order)) if name == "reversed" else order
            settings = Finetuning(steps=steps, lr=1e-3, seed=seed, stages=1 if name == "at once" else stages)
            tuned = finetune(model, allocation, data, cross_entropy, settings, acceptance=[unseen], order=given)
            quality = reference.measure(tuned.model)
            harms.append(float(quality.harm.mean()))
            print(f"stages seed {seed}, {name}: {quality}, KL {harms[-1]:.4f}", flush=True)
    gains = [other - own for own, other in zip(found["hawq"], found["reversed"], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    print(f"order of {len(order)} layers: {', '.join(order)}")
    mean = statistics.mean(gains)
    note = f"(+- {error:.4f} over {seeds} seeds)"
    return [result("stages_gain_over_reversed/resnet20/int2", mean, ">0", mean > error, note)]


def over_seeds(name: str, values: Sequence[float], goal: float) -> str:
    """RESULT line of the mean over seeds; every seed has to reach the goal."""
    note = f"(from {min(values):.3f} to {max(values):.3f} over {len(values)} seeds)" if len(values) > 1 else ""
    return result(name, statistics.mean(values), f">={goal}", min(values) >= goal, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, part of the data")
    parser.add_argument("--only", choices=("resnet20", "llama5m", "smollm2", "stages"))
    parser.add_argument("--steps", type=int, help="of a run (default: 300; 16 when quick)")
    parser.add_argument("--seeds", type=int, help="runs (default: 3; 1 when quick)")
    options = parser.parse_args()
    quick = options.quick
    steps, seeds = options.steps or (16 if quick else 300), options.seeds or (1 if quick else 3)
    count, windows, tested = (256, 40, 8) if quick else (2000, 400, 32)
    test = cifar10_test()[: 1 if quick else None]
    lines: list[str] = []
    if options.only in (None, "resnet20"):
        lines += resnet20(steps, seeds, count, test)
    if options.only in (None, "llama5m"):
        lines += llama5m(steps, seeds, windows, tested)
    if options.only == "smollm2":
        lines += smollm2_135m(steps, seeds, windows, tested)
    if options.only in (None, "stages"):
        lines += in_stages(steps, seeds, count, test)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
