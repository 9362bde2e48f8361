"""KV-cache formats by layer against one format for all, and weights plus cache in one budget.

    python -m experiments.benchmarks.bench_kv [--quick] [--models llama5m tiny-lm smollm2] [--draws 1]

Scores come from calibration data, splits are chosen on other data; reported is the mean KL divergence from the original
on held-out data. (1) The cache alone, at the bytes of a uniform format of 8, 4, 3 and 2 bits. (2) One memory budget for
weights and cache against five fixed splits, each a uniform cache with the weights' optimum in the rest. (3) Predicted
against measured divergence of single cache entries. (4) On SmolLM2, which can copy: copying a passage from the
beginning of a text.
"""

import argparse
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from scipy.stats import spearmanr

from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.cache import CACHE_FORMATS
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.evaluation import Quality, Reference
from mpq.exporters.holding import restrict
from mpq.exporters.targets import TARGETS
from mpq.measuring import Measurer, store_for
from mpq.memory import Request, Serving, choose_cache, weights_within
from mpq.network.cached import changing
from mpq.network.calibration import logits_of, next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import CacheRounding
from mpq.search import frontier_of
from mpq.sensitivity.profile import profile
from mpq.sources import Source, open_source

UNIFORM = ("int8-token", "int4-asym", "int3-asym", "int2-asym")
SPLITS = ("int2-asym", "int3-asym", "int4-asym", "int6-asym", "int8-token")
WEIGHTS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-channel")
CONTEXT = 8192  # tokens of part 1
NEEDLES, PASSAGE = 6, 32  # passages, and tokens of each; the second half is to be copied
MEMORIES = (3.0, 3.75, 4.75)  # bits, averaged over the weights and as many cached numbers
GOALS = {"int8-token": 1.0, "int4-asym": 1.0, "int3-asym": 0.67, "int2-asym": 0.67}  # share of uniform's divergence


def tokens_source(name: str, model: torch.nn.Module, *tokens: torch.Tensor) -> Source:
    """A language model on windows of tokens: for scores, for choosing, for the report."""
    seen, chosen, unseen = (each.split(8) for each in tokens)
    return Source(name, model, seen, unseen, next_token_loss, "perplexity", acceptance=chosen)


def llama5m(draw: int) -> Source:
    """The small Llama on WikiText-2."""
    train = reference_models.wikitext_tokens("train", 32 * (draw + 1))[32 * draw :]
    tokens = [train, *(reference_models.wikitext_tokens(split, 16) for split in ("valid", "test"))]
    return tokens_source("llama5m", reference_models.wikitext_llama(), *tokens)


def smollm2(draw: int) -> Source:
    """SmolLM2-135M off its 4-bit lattice."""
    model, train = reference_models.smollm2(windows=24 + 8 * draw)
    return tokens_source("smollm2", model, train[16 + 8 * draw : 24 + 8 * draw], train[:8], train[8:16])


def tiny(draw: int) -> Source:
    """The bundled language model."""
    return open_source("tiny-lm", nsamples=32, seed=draw, evaluation_samples=32)


MODELS: dict[str, Callable[[int], Source]] = {"llama5m": llama5m, "smollm2": smollm2, "tiny-lm": tiny}


def table_of(source: Source) -> SensitivityTable:
    """Weights and cache in all candidate formats."""
    store = store_for("mse", source, find_layers(source.model))
    return profile(
        source.model,
        source.calibration,
        source.loss_fn,
        WEIGHTS,
        method=store,
        progress=False,
        cache=CACHE_FORMATS,
    )


def measured(source: Source, reference: Reference, cache: CacheFormats) -> Quality:
    """The original model with its cache rounded."""
    with changing(source.model, CacheRounding(cache)):
        return reference.measure(source.model)


def cache_alone(source: Source, table: SensitivityTable, reference: Reference) -> list[str]:
    """RESULT lines of part 1."""
    pin = {"*": WEIGHTS[-1]}
    frontier = frontier_of(table, pin=pin, cost="cache", context=CONTEXT)
    lines = []
    for name in UNIFORM:
        uniform = CacheFormats.uniform(table.entries, name)
        mixed = frontier.at(cost=uniform.nbytes(CONTEXT)).cache
        assert mixed is not None
        one, other = measured(source, reference, mixed), measured(source, reference, uniform)
        (kl, error), (against, _) = one.harm_with_error(), other.harm_with_error()
        difference, noise = one.harm_above(other) if mixed != uniform else (0.0, 1.0)
        print(
            f"  all {name:10} {uniform.bits:.3f} bits  KL {against:.4g}; by layer {mixed.bits:.3f} bits  "
            f"KL {kl:.4g} +- {error:.1g}, predicted {_predicted(table, mixed):.4g}",
            flush=True,
        )
        title, share, goal = f"{source.name} cache at {name}", kl / against, GOALS[name]
        lines.append(result(f"{title} KL by layer/uniform", share, f"<={goal:.2f}", share <= goal))
        lines.append(_significance(title, difference, noise))
    return lines


def one_budget(source: Source, table: SensitivityTable) -> list[str]:
    """RESULT lines of part 2."""
    target = TARGETS.named("mpq")
    held = restrict(table, target)
    weights, numbers = (sum(one.params for one in group) for group in (table.weights().layers, table.entries))
    overhead, context = int(table.provenance["overhead"]), weights // numbers
    measurer = Measurer(source, store_for("mse", source, table.weights().layers))
    lines = []
    for bits in MEMORIES:
        memory = overhead + 2**14 + bits * (weights + context * numbers) / 8
        request = Request(source.model, Serving(context, 1, memory), target)
        chosen = weights_within(held, request, choose_cache(held, request, measurer))
        found = {"one budget": chosen}
        for name in SPLITS:
            cache = CacheFormats.uniform(table.entries, name)
            try:
                found[f"cache {name}"] = weights_within(held, request, cache)
            except MpqError:
                continue
        qualities = {}
        for name, allocation in found.items():
            if allocation.memory(context) > memory:
                continue
            qualities[name] = measurer.quality(allocation, "evaluation")
            _print_split(bits, name, allocation, qualities[name])
        best = min(
            (name for name in qualities if name != "one budget"), key=lambda name: qualities[name].harm_with_error()[0]
        )
        share = qualities["one budget"].harm_with_error()[0] / qualities[best].harm_with_error()[0]
        difference, error = qualities["one budget"].harm_above(qualities[best])
        title = f"{source.name} memory of {bits:g} bits"
        lines.append(result(f"{title} KL/best fixed split ({best})", share, "<=1", share <= 1))
        lines.append(_significance(title, difference, error))
    return lines


def _significance(title: str, difference: float, error: float) -> str:
    return result(f"{title} difference in standard errors", difference / error, "<=2", difference <= 2 * error)


def _print_split(bits: float, name: str, allocation: Allocation, quality: Quality) -> None:
    assert allocation.cache is not None
    print(
        f"  {bits:.2f} {name:18} weights {allocation.bits:.3f}, cache {allocation.cache.bits:.3f} bits  KL "
        f"{quality.harm_with_error()[0]:.4g}, predicted {allocation.loss:.4g}",
        flush=True,
    )


def single_entries(source: Source, table: SensitivityTable, reference: Reference, name: str = "int2-asym") -> list[str]:
    """RESULT lines of part 3."""
    pairs = []
    for entry in table.entries:
        cache = CacheFormats((entry,), (name,))
        pairs.append((_predicted(table, cache), measured(source, reference, cache).harm_with_error()[0]))
    predicted, actual = np.array(pairs).T
    rank = float(spearmanr(predicted, actual)[0])
    ratio = float(predicted.sum() / actual.sum())
    return [
        result(f"{source.name} rank correlation of single entries in {name}", rank, ">=0.9", rank >= 0.9),
        result(f"{source.name} predicted/measured sum in {name}", ratio, "0.7..1.3", 0.7 <= ratio <= 1.3),
    ]


@torch.no_grad()
def needle(source: Source, table: SensitivityTable, filler: int = 700) -> list[str]:
    """RESULT lines of part 4: the share of a text's first passage that is copied with caches of equal bytes."""
    tokens = torch.cat([batch.flatten() for batch in source.evaluation])
    passages = tokens[: NEEDLES * PASSAGE].view(NEEDLES, PASSAGE)
    between = tokens[NEEDLES * PASSAGE :][:filler].expand(NEEDLES, -1)
    text = torch.cat([passages, between, passages], 1)
    frontier = frontier_of(table, pin={"*": WEIGHTS[-1]}, cost="cache", context=CONTEXT)

    def copied(cache: CacheFormats | None) -> float:
        with changing(source.model, CacheRounding(cache)) if cache is not None else nullcontext():
            found = torch.cat([logits_of(source.model(one))[:, -PASSAGE // 2 - 1 : -1] for one in text.split(1)])
        return float((found.argmax(-1) == passages[:, -PASSAGE // 2 :]).float().mean())

    original, lines = copied(None), []
    print(f"  passage of {PASSAGE} tokens after {filler} others: original copies {original:.3f}", flush=True)
    for name in UNIFORM[1:]:
        uniform = CacheFormats.uniform(table.entries, name)
        mixed = frontier.at(cost=uniform.nbytes(CONTEXT)).cache
        found, against = copied(mixed), copied(uniform)
        print(f"  {uniform.bits:.3f} bits: all {name} copies {against:.3f}, by layer {found:.3f}", flush=True)
        lines.append(
            result(f"{source.name} passage copied at {name}, by layer", found, f">={against:.3f}", found >= against)
        )
    return lines


def _predicted(table: SensitivityTable, cache: CacheFormats) -> float:
    rows = {layer.name: i for i, layer in enumerate(table.layers)}
    pairs = zip(cache.entries, cache.names, strict=True)
    return float(sum(table.scores[rows[entry.name], table.schemes.index(f"kv:{name}")] for entry, name in pairs))


def main() -> None:
    """Run the selected parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled language model alone")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--draws", type=int, default=1, help="of calibration data (default: 1)")
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.models or (["tiny-lm"] if options.quick else ["tiny-lm", "llama5m"]):
        for draw in range(options.draws):
            try:
                source = MODELS[name](draw)
            except (MpqError, FileNotFoundError) as error:
                print(f"{name} left out: {error}")
                continue
            start = time.process_time()
            table = table_of(source)
            print(f"{name}: table in {time.process_time() - start:.0f} CPU s", flush=True)
            reference = Reference(source.model, source.evaluation, source.kind, source.loss_fn)
            lines += cache_alone(source, table, reference)
            lines += one_budget(source, table)
            lines += single_entries(source, table, reference)
            lines += needle(source, table) if name == "smollm2" else []
    print("\n".join(lines))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
