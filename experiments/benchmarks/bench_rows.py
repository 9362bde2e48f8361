"""Formats by row against formats by layer and uniform formats, at equal bytes and with equal rounding.

    python -m experiments.benchmarks.bench_rows [--quick] [--models llama5m ...] [--bits 3.25] [--draws 3] [--tuned]

Scores and second moments come from calibration data, different for each draw. Reported is the mean KL divergence from
the original on held-out data, beside the table's prediction. Rows are compared with whole layers, with the best uniform
format that fits, and, without a goal, with uniform integers of the same bytes. SmolLM2's perplexity is that of 12 times
512 tokens of WikiText-2's raw test text; `--tuned` tunes the scales of its rows at 3.25 bits, as `mpq quantize` does.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from experiments.models import reference_models
from experiments.result import result
from mpq.acceptance import SAMPLES, STEPS
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.core.problem import restricted
from mpq.evaluation import Quality
from mpq.measuring import Measurer, store_for
from mpq.network.calibration import cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from mpq.rounding.store import RoundingStore
from mpq.search import frontier_of
from mpq.search.exact import exact
from mpq.sensitivity.profile import profile
from mpq.sources import Source, open_source
from mpq.training.tuned_scales import Tuning

LANGUAGE = tuple(f"nl{width}-g64" for width in (2, 3, 4, 5))
IMAGES = (*(f"nl{width}-channel" for width in (2, 3, 4, 5)), "int6-channel", "int8-channel")
BITS = (2.5, 2.75, 3.0, 3.25, 3.75, 4.25)
GOALS = {"layers": 0.8, "uniform": 0.67}  # largest share of a language model's KL divergence
PREDICTED = 0.15  # largest relative error of a language model's predictions
PERPLEXITIES = {"rows": 51.0, "tuned": 43.0}  # SmolLM2 at 3.25 bits
SHOWN = 3.25
NEAR = 0.97  # smallest share of the budget that a uniform format must use to be compared


@dataclass(frozen=True)
class Contest:
    """A model with its data, the formats to choose from and the rounding."""

    source: Source
    formats: tuple[str, ...]
    method: str


def language(name: str, model: torch.nn.Module, tokens: torch.Tensor, unseen: torch.Tensor) -> Contest:
    """A language model on windows of tokens."""
    return Contest(
        Source(name, model, tokens.split(8), unseen.split(4), next_token_loss, "perplexity"), LANGUAGE, "gptq"
    )


def llama5m(draw: int) -> Contest:
    """The small Llama."""
    train = reference_models.wikitext_tokens("train", 32 * (draw + 1))[32 * draw :]
    return language("llama5m", reference_models.wikitext_llama(), train, reference_models.wikitext_tokens("test", 32))


def smollm2(draw: int) -> Contest:
    """SmolLM2-135M off its 4-bit lattice."""
    model, tokens_of = reference_models.smollm2_and_text()
    train = tokens_of("train", 128 * (draw + 1), 256)[128 * draw :]  # as many windows as `mpq quantize` takes
    source = Source(
        "smollm2", model, train.split(1), tokens_of("raw_test", 12, 512).split(1), next_token_loss, "perplexity"
    )
    return Contest(source, LANGUAGE, "gptq")


def resnet(depth: int, draw: int) -> Contest:
    """A CIFAR-10 ResNet, by channel."""
    seen = reference_models.cifar10_calibration(256 * (draw + 1))
    test = reference_models.cifar10_test()[:2]
    count = len(seen) // (draw + 1)
    source = Source(f"resnet{depth}", reference_models.resnet(depth), seen[-count:], test, cross_entropy, "accuracy")
    return Contest(source, IMAGES, "mse")


def efficientnet(draw: int) -> Contest:
    """EfficientNet-Lite0, by channel."""
    sample = reference_models.imagenet_sample
    source = Source(
        "efficientnet-lite0", reference_models.efficientnet_lite0(), sample(160 * draw, 160), sample(500, 320),
        cross_entropy, "accuracy",
    )  # fmt: skip
    return Contest(source, IMAGES, "mse")


def tiny(draw: int) -> Contest:
    """The bundled language model."""
    return Contest(open_source("tiny-lm", nsamples=32), LANGUAGE[:3], "gptq")


MODELS: dict[str, Callable[[int], Contest]] = {
    "llama5m": llama5m, "smollm2": smollm2, "resnet20": partial(resnet, 20), "resnet56": partial(resnet, 56),
    "efficientnet-lite0": efficientnet, "tiny-lm": tiny,
}  # fmt: skip


def frontiers(contest: Contest, store: RoundingStore) -> dict[str, Frontier]:
    """By rows and by whole layers, from one table."""
    source = contest.source
    table = profile(
        source.model, source.calibration, source.loss_fn, contest.formats, metric="kl-curvature", method=store,
        progress=False, granularity="row",
    )  # fmt: skip
    by_rows = frontier_of(table)
    return {"rows": by_rows, "layers": exact(restricted(by_rows.problem, contest.formats))}


def compare(contest: Contest, bits: Sequence[float], tuned: bool) -> list[str]:
    """Measure one draw of one model and print its RESULT lines."""
    start = time.process_time()
    store = store_for(contest.method, contest.source, find_layers(contest.source.model))
    found, measurer = frontiers(contest, store), Measurer(contest.source, store)
    print(f"{contest.source.name}: {contest.method}, table and frontiers {time.process_time() - start:.0f} CPU s")
    lines = []
    for budget in bits:
        qualities = {}
        for name, allocation in contestants(found, budget).items():
            qualities[name] = told(budget, name, allocation, measured(measurer, allocation))
            if name == "rows" and tuned and budget == SHOWN:
                rounder = measurer.tuned(allocation, Tuning(STEPS["normal"], SAMPLES["perplexity"]), {})
                quality = measurer.quality(allocation, "evaluation", rounder=rounder)
                qualities["tuned"] = told(budget, "tuned", allocation, quality)
        for other in GOALS:
            lines += _results(contest, budget, qualities, other) if other in qualities else []
        if contest.source.kind == "perplexity" and "rows" in qualities:
            lines += _language_results(contest.source.name, budget, found["rows"].at(bits=budget), qualities)
    return lines


def contestants(found: dict[str, Frontier], budget: float) -> dict[str, Allocation]:
    """Rows, whole layers, the best uniform format that fits, and integers of the same bytes, where they exist."""
    chosen = {name: frontier.at(bits=budget) for name, frontier in found.items() if _reaches(frontier, budget)}
    uniform = [one for _, one in found["layers"].uniform() if NEAR * budget <= one.bits <= budget]
    if uniform:
        chosen["uniform"] = best = max(uniform, key=lambda one: one.bits)
        if best.schemes[0].startswith("nl"):
            chosen["integers"] = replace(best, schemes=tuple(name.replace("nl", "int") for name in best.schemes))
    return chosen


def told(budget: float, name: str, allocation: Allocation, quality: Quality) -> Quality:
    """The quality, which is printed beside the prediction."""
    kl, error = quality.harm_with_error()
    print(
        f"  {budget:.2f} {name:8} {allocation.bits:.3f} bits  KL {kl:.4g} +- {error:.1g}, predicted "
        f"{allocation.loss:.4g}  {quality}",
        flush=True,
    )
    return quality


def _reaches(frontier: Frontier, bits: float) -> bool:
    return bool(frontier.bits[0] <= bits)


def measured(measurer: Measurer, allocation: Allocation) -> Quality:
    """Quality on held-out data, with running means re-estimated where there are any."""
    return measurer.quality(allocation, "evaluation", measurer.means(allocation))


def _results(contest: Contest, bits: float, qualities: dict[str, Quality], other: str) -> list[str]:
    """RESULT lines: paired difference in standard errors, and the relative improvement of rows."""
    rows, against = qualities["rows"], qualities[other]
    difference, error = rows.harm_above(against)
    share, goal = rows.harm_with_error()[0] / against.harm_with_error()[0], GOALS[other]
    name = f"{contest.source.name} {bits:.2f} rows/{other}"
    lines = [result(f"{name} difference in standard errors", difference / error, "<=2", difference <= 2 * error)]
    if contest.formats == LANGUAGE:
        lines.append(result(f"{name} KL", share, f"<={goal:.2f}", share <= goal))
    return lines


def _language_results(name: str, bits: float, rows: Allocation, qualities: dict[str, Quality]) -> list[str]:
    """RESULT lines: the prediction of the rows' KL divergence, and SmolLM2's perplexities."""
    ratio = rows.loss / qualities["rows"].harm_with_error()[0]
    goal = f"{1 - PREDICTED}..{1 + PREDICTED}"
    lines = [result(f"{name} {bits:.2f} predicted/measured", ratio, goal, abs(ratio - 1) <= PREDICTED)]
    if name == "smollm2" and bits == SHOWN:
        values = {kind: qualities[kind].value for kind in PERPLEXITIES if kind in qualities}
        for kind, value in values.items():
            most = PERPLEXITIES[kind]
            lines.append(result(f"{name} {bits:.2f} {kind} perplexity", value, f"<{most}", value < most))
    return lines


def main() -> None:
    """Run the selected contests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny language model, two budgets, one draw")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--bits", nargs="+", type=float)
    parser.add_argument("--draws", type=int, default=1, help="of calibration data (default: 1)")
    parser.add_argument("--tuned", action="store_true", help="tune the scales of the rows, too")
    options = parser.parse_args()
    lines: list[str] = []
    bits = options.bits or ((3.0, 3.25) if options.quick else BITS)
    for name in options.models or (["tiny-lm"] if options.quick else ["llama5m", "resnet20", "smollm2"]):
        for draw in range(options.draws):
            try:
                lines += compare(MODELS[name](draw), bits, options.tuned)
            except (MpqError, FileNotFoundError) as error:
                print(f"{name} left out: {error}")
    print("\n".join(lines))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
