"""How much of GPTQ's rounding loss scales tuned against the float model recover, on held-out text.

    python -m experiments.benchmarks.bench_tuned_scales [--quick]

Uniform formats, GPTQ's moments from 48 windows of 256 tokens of WikiText-2's training text, scales tuned on other
windows; mean KL divergence from the float model on windows of the test text, paired.
"""

import argparse
import copy
import statistics
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from experiments.models.reference_models import data_file, wikitext_llama, wikitext_tokens
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.network.calibration import next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.quantized import quantized_layers
from mpq.rounding.reference import Quantized, dequantize
from mpq.training.tuned_scales import Tuning, divergence, tune_scales

GOAL = {"llama5m": 0.85, "smollm2": 0.75}  # divergence after over before


def compare(name: str, model: nn.Module, train: Tensor, test: Tensor, format: str, tuning: Tuning) -> float:
    """Divergence with tuned scales over divergence without, at the same codes and bytes."""
    windows = train[torch.randperm(len(train), generator=seeded(0))]
    layers = find_layers(model)
    allocation = Allocation(layers, (format,) * len(layers))
    moments = second_moments(model, layers, windows[:48].split(4), next_token_loss)
    start = {layer.name: found for layer, _, found in quantized_layers(model, allocation, "gptq", moments)}
    begin = time.perf_counter()
    tuned = tune_scales(model, allocation, start, windows[48:].split(4), next_token_loss, tuning)
    seconds = time.perf_counter() - begin
    before, after = (divergences(model, allocation, weights, test) for weights in (start, tuned))
    gains = [one - other for one, other in zip(before, after, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    one, other = statistics.mean(before), statistics.mean(after)
    print(
        f"{name} {format}: KL {one:.4f} to {other:.4f}, gain {one - other:.4f} +- {error:.4f} over "
        f"{len(test)} windows; {tuning.steps} steps, {seconds / tuning.steps:.2f} s each"
    )
    return other / one


@torch.no_grad()
def divergences(
    model: nn.Module, allocation: Allocation, weights: Mapping[str, Quantized], windows: Tensor
) -> Sequence[float]:
    """Mean divergence on each window."""
    student = copy.deepcopy(model)
    for layer in allocation.layers:
        student.get_submodule(layer.name).weight.copy_(dequantize(weights[layer.name]))
    return [divergence(student(window).logits, model(window).logits)[0].item() for window in windows.split(1)]


def smollm2() -> tuple[nn.Module, Tensor, Tensor]:
    """SmolLM2-135M off its 4-bit lattice, and windows of 256 tokens: 400 of the training text, 16 of the test."""
    sys.path.insert(0, str(data_file("smollm2.py").parent))
    from smollm2 import load

    model, tokenizer = load()
    parts = []
    for name, windows in (("wikitext2_train", 400), ("wikitext2_raw_test", 16)):
        with zipfile.ZipFile(data_file("texts.zip")) as archive:
            text = archive.read(f"{name}.txt").decode("utf-8")[: windows * 256 * 12]
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        parts.append(tokens[: windows * 256].view(-1, 256))
    return model, parts[0], parts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model, 12 steps")
    quick = parser.parse_args().quick
    runs = [
        (
            "llama5m",
            wikitext_llama(),
            wikitext_tokens("train", 110 if quick else 400),
            wikitext_tokens("test", 16),
            "int3-g64",
        )
    ]
    if not quick:
        runs.append(("llama5m", *runs[0][1:4], "int2-g64"))
        runs.append(("smollm2", *smollm2(), "int3-g64"))
    results = []
    for name, model, train, test, format in runs:
        share = compare(name, model, train, test, format, Tuning(steps=12 if quick else 60))
        goal = 0.95 if quick else GOAL[name]
        results.append(result(f"tuned_over_gptq/{name}/{format}", share, f"<={goal}", share <= goal))
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
