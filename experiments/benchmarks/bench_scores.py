"""Predicted against measured divergence: uniform formats, single (layer, format) cells, the exact search's allocation.

    python -m experiments.benchmarks.bench_scores [--quick] [--models llama5m resnet20 ...]
        [--metrics kl-curvature kronecker]
        [--cells 60] [--options '{"draws": 4}']

Divergence is measured on held-out data with the same rounding as the scores: GPTQ in groups of 64 for language models,
clip search by channel for CNNs. Allocations are compared at the size of uniform int3. `--quick` takes the bundled
models. RESULT lines come last.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from experiments.models import reference_models
from experiments.result import result
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.table import SensitivityTable
from mpq.network.calibration import Batch, LossFn, cross_entropy, logits_of, next_token_loss
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.network.moments import second_moments
from mpq.rounding.store import RoundingStore
from mpq.search import frontier_of
from mpq.sensitivity import metric_named
from mpq.sensitivity.task import Task

MODELS = ("llama5m", "smollm2", "resnet20", "resnet56", "efficientnet-lite0")
QUICK = ("tiny-cnn",)
FACTOR = 2.0  # factor within which a cell counts as predicted


@dataclass(frozen=True)
class Contest:
    """A model, data for scores, held-out data, and the candidate formats."""

    name: str
    model: nn.Module
    calibration: tuple[Batch, ...]
    unseen: tuple[Batch, ...]
    loss_fn: LossFn
    formats: tuple[str, ...]
    method: str

    def task(self) -> Task:
        """A metric's input, with its own journal."""
        layers, schemes = find_layers(self.model), tuple(map(parse_scheme, self.formats))
        moments = {}
        if self.method == "gptq":
            moments = second_moments(self.model, layers, self.calibration, self.loss_fn)
        rounder = RoundingStore(self.method, moments)
        return Task(self.model, self.calibration, self.loss_fn, layers, schemes, rounder)


def language(name: str, model: nn.Module, calibration: Tensor, unseen: Tensor, size: int = 64) -> Contest:
    """A language model on windows of tokens."""
    formats = tuple(f"int{bits}-g{size}" for bits in (2, 3, 4, 5))
    return Contest(name, model, calibration.split(8), unseen.split(2), next_token_loss, formats, "gptq")


def images(name: str, model: nn.Module, calibration: tuple[Batch, ...], unseen: tuple[Batch, ...]) -> Contest:
    """A classifier."""
    formats = tuple(f"int{bits}-channel" for bits in (2, 3, 4, 5, 6, 8))
    return Contest(name, model, calibration, unseen, cross_entropy, formats, "mse")


def contest(name: str) -> Contest:
    """The contest of this name; loads its model and data."""
    if name == "llama5m":
        tokens = reference_models.wikitext_tokens
        return language(name, reference_models.wikitext_llama(), tokens("train", 32), tokens("test", 16))
    if name == "smollm2":
        model, train = reference_models.smollm2()
        return language(name, model, train[:32], train[40:48])
    if name.startswith("resnet"):
        model = reference_models.resnet(int(name.removeprefix("resnet")))
        return images(name, model, reference_models.cifar10_calibration(256), reference_models.cifar10_test()[:2])
    if name == "efficientnet-lite0":
        sample = reference_models.imagenet_sample
        return images(name, reference_models.efficientnet_lite0(), sample(0, 192), sample(500, 160))
    return bundled(name)


def bundled(name: str) -> Contest:
    """One of the bundled models."""
    from mpq.sources import open_source

    source = open_source(name)
    model, batches = source.model, tuple(source.calibration)
    half = max(1, len(batches) // 2)
    if name == "tiny-lm":
        return Contest(
            name, model, batches[:half], batches[half:], source.loss_fn, ("int2-g64", "int3-g64", "int4-g64"), "gptq"
        )
    return Contest(
        name, model, batches[:half], batches[half:], source.loss_fn,
        ("int2-channel", "int3-channel", "int4-channel", "int6-channel"), "mse",
    )  # fmt: skip


@torch.no_grad()
def log_probabilities(contest: Contest) -> list[Tensor]:
    """Log-probabilities on held-out data, batch by batch."""
    found: list[Tensor] = []
    handle = contest.model.register_forward_hook(lambda module, args, output: found.append(logits_of(output)))
    for batch in contest.unseen:
        contest.loss_fn(contest.model, batch)
    handle.remove()
    return [logits.float().log_softmax(-1) for logits in found]


@torch.no_grad()
def divergence(contest: Contest, reference: list[Tensor]) -> tuple[float, float]:
    """Mean KL divergence from the reference by prediction, and its standard error over samples."""
    means: list[Tensor] = []

    def compare(module: nn.Module, args: Any, output: Any) -> None:
        known = reference[len(means)]
        parts = zip(known, logits_of(output).float(), strict=True)
        means.append(torch.stack([(one.exp() * (one - other.log_softmax(-1))).sum(-1).mean() for one, other in parts]))

    handle = contest.model.register_forward_hook(compare)
    for batch in contest.unseen:
        contest.loss_fn(contest.model, batch)
    handle.remove()
    values = torch.cat(means).double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


@contextmanager
def rounded(task: Task, chosen: Mapping[Layer, Scheme]) -> Iterator[None]:
    """Context manager: replace these layers' weights by their rounded values."""
    before = {layer: weight_matrix(task.module(layer)).detach().clone() for layer in chosen}

    def put(layer: Layer, matrix: Tensor) -> None:
        module = task.module(layer)
        with torch.no_grad():
            module.weight.copy_(matrix_to_weight(matrix, module))  # type: ignore[operator]

    wanted = {layer: task.quantized(layer, scheme) for layer, scheme in chosen.items()}
    try:
        for layer, matrix in wanted.items():
            put(layer, matrix)
        yield
    finally:
        for layer, matrix in before.items():
            put(layer, matrix)


def judge(contest: Contest, metrics: Sequence[str], count: int, options: Mapping[str, Any]) -> list[str]:
    """Print the tables of one contest; return the RESULT lines of the first metric."""
    tables: dict[str, tuple[Any, Any]] = {}
    for metric in metrics:
        start = time.perf_counter()
        score: Callable[..., Any] = metric_named(metric)
        tables[metric] = (partial(score, **options) if metric == metrics[0] else score)(contest.task())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{contest.name} {metric}: {time.perf_counter() - start:.0f} s, peak so far {peak:.2f} GB", flush=True)
    task, reference = contest.task(), log_probabilities(contest)
    lines = uniform_formats(contest, task, reference, tables)
    lines += cells(contest, task, reference, tables, count) if count else []
    return lines + allocations(contest, task, reference, tables)


Tables = Mapping[str, tuple[Any, Any]]  # by metric: scores and errors (layers, schemes)


def uniform_formats(contest: Contest, task: Task, reference: list[Tensor], tables: Tables) -> list[str]:
    """Compare summed scores with the measured divergence of the whole model in one format."""
    lines = []
    for column, scheme in enumerate(task.schemes):
        with rounded(task, dict.fromkeys(task.layers, scheme)):
            value, error = divergence(contest, reference)
        sums = {metric: scores[:, column].sum() for metric, (scores, _) in tables.items()}
        figures = "  ".join(f"{metric} {total:.4g}" for metric, total in sums.items())
        print(f"{contest.name} uniform {scheme.name}: measured {value:.4g} +- {error:.1g}  {figures}", flush=True)
        ratio = next(iter(sums.values())) / value
        lines.append(result(f"{contest.name} {scheme.name} predicted/measured", ratio, "0.5..2", 0.5 <= ratio <= 2))
    return lines


def cells(contest: Contest, task: Task, reference: list[Tensor], tables: Tables, count: int) -> list[str]:
    """Measure single layers in single formats: rank correlation, and the share predicted within a factor."""
    size = len(task.layers) * len(task.schemes)
    picked = np.random.default_rng(0).permutation(size)[:count]
    places = [np.unravel_index(number, (len(task.layers), len(task.schemes))) for number in picked]
    measured, errors = np.zeros(len(places)), np.zeros(len(places))
    for number, (i, j) in enumerate(places):
        with rounded(task, {task.layers[i]: task.schemes[j]}):
            measured[number], errors[number] = divergence(contest, reference)
    lines = []
    for metric, (scores, _) in tables.items():
        predicted = np.array([scores[place] for place in places])
        clear = measured > 2 * errors
        ratios = predicted[clear] / measured[clear]
        near = float(np.mean(np.maximum(ratios, 1 / ratios) <= FACTOR))
        worst = float(np.max(np.maximum(ratios, 1 / ratios)))
        rank = float(spearmanr(predicted, measured).statistic)
        by_format = {
            scheme.name: float(np.exp(np.mean(np.log(ratios[[places[k][1] == j for k in np.flatnonzero(clear)]]))))
            for j, scheme in enumerate(task.schemes)
            if any(places[k][1] == j for k in np.flatnonzero(clear))
        }
        print(f"{contest.name} cells {metric}: Spearman {rank:.3f}, within {FACTOR:g}x {near:.2f}, worst {worst:.1f}x,")
        print("   predicted/measured " + ", ".join(f"{name} {value:.2f}" for name, value in by_format.items()))
        if metric == next(iter(tables)):
            lines += [
                result(f"{contest.name} cells Spearman", rank, ">=0.9", rank >= 0.9),
                result(f"{contest.name} cells within {FACTOR:g}x", near, ">=0.8", near >= 0.8),
                result(f"{contest.name} cells worst", worst, "<10", worst < 10),
            ]
    return lines


def allocations(contest: Contest, task: Task, reference: list[Tensor], tables: Tables) -> list[str]:
    """Measure the exact search's allocation at the size of uniform int3 beside uniform int3."""
    lines = []
    names = tuple(scheme.name for scheme in task.schemes)
    uniform = next(scheme for scheme in task.schemes if scheme.name.startswith("int3"))
    with rounded(task, dict.fromkeys(task.layers, uniform)):
        bar, bar_error = divergence(contest, reference)
    for metric, (scores, errors) in tables.items():
        frontier = frontier_of(SensitivityTable(task.layers, names, scores, errors, metric), ties=False)
        bits = next(allocation.bits for name, allocation in frontier.uniform() if name == uniform.name)
        chosen = frontier.at(bits=bits)
        with rounded(task, {layer: chosen.scheme_of[layer.name] for layer in task.layers}):
            value, error = divergence(contest, reference)
        figures = (
            f"measured {value:.4g} +- {error:.1g}, predicted {chosen.loss:.4g}, uniform {bar:.4g} +- {bar_error:.1g}"
        )
        print(f"{contest.name} {metric} at {bits:.3f} bits: {figures}", flush=True)
        if metric == next(iter(tables)):
            lines.append(result(f"{contest.name} allocation/uniform", value / bar, "<=1", value <= bar))
    return lines


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--models", nargs="+", default=None, help=f"of {', '.join(MODELS + QUICK)}")
    parser.add_argument("--metrics", nargs="+", default=["kl-curvature", "kronecker"])
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--options", type=json.loads, default={}, help="of the first metric, as JSON")
    options = parser.parse_args()
    names = options.models or (QUICK if options.quick else MODELS)
    lines = [line for name in names for line in judge(contest(name), options.metrics, options.cells, options.options)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
