"""Weights and cache in one budget: the whole job, refusals and messages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_cnn import images, small_cnn

import mpq
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.latency import Latency, LatencyTable
from mpq.core.scheme import parse_scheme
from mpq.exporters.holding import restrict
from mpq.exporters.targets import TARGETS
from mpq.measuring import Measurer, store_for
from mpq.memory import Request, Serving, choose_cache, serving_of, splits, weights_within
from mpq.network.calibration import cross_entropy
from mpq.search.budgets import Budgets, cache_seconds
from mpq.search.choice import allocate
from mpq.sensitivity.profile import profile
from mpq.sources import Source, open_source

FORMATS = ("int2-g32", "int4-g32", "int8-channel")
CACHES = ("int2-asym", "int3-asym", "int4-asym", "int8-token", "fp16")
SETTINGS = {"formats": FORMATS, "metric": "fisher", "progress": False, "tuning_steps": 0, "effort": "fast"}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("tiny-lm", nsamples=8, seqlen=64, evaluation_samples=8)


@pytest.fixture(scope="module")
def table(source: Source) -> mpq.SensitivityTable:
    return profile(
        source.model, source.calibration, source.loss_fn, FORMATS, metric="fisher", progress=False, cache=CACHES
    )


def test_the_whole_job_keeps_to_the_memory(source: Source, table: mpq.SensitivityTable, tmp_path: Path) -> None:
    outcome = mpq.quantize(source, tmp_path / "out", memory="900kB", context=200, batch=4, table=table, **SETTINGS)
    cache = outcome.allocation.cache
    assert cache is not None
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 850_000 < size + cache.nbytes(200, 4) <= 900_000
    assert mpq.Allocation.load(tmp_path / "out" / "allocation.json").cache == cache
    assert any("leave room for" in sentence for sentence in outcome.words())
    tokens = cache.tokens_in(900_000 - size, 4)
    assert tokens >= 200
    assert f"room for {tokens} tokens of each of 4 texts" in " ".join(outcome.words())
    heading, *points = outcome.tokens()
    assert heading[-1] == "tokens of each of 4 texts"
    counts = [int(row[-1].replace(",", "")) for row in points]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 200 > counts[-1]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Tokens that fit the memory" in report
    assert "cache.5.values" in report
    first = (tmp_path / "out" / "frontier.csv").read_text().splitlines()
    column = first[1].split(",").index("tokens")
    assert int(first[2].split(",")[column]) == counts[0]


def test_weights_and_cache_can_have_separate_budgets(
    source: Source, table: mpq.SensitivityTable, tmp_path: Path
) -> None:
    outcome = mpq.quantize(source, tmp_path / "out", bits=5, kv_bits=4, table=table, **SETTINGS)
    assert outcome.allocation.bits <= 5
    assert 3.5 < outcome.allocation.cache.bits <= 4
    assert len(set(outcome.allocation.cache.names)) > 1


def test_a_cache_budget_alone_leaves_weights_unquantized(source: Source, tmp_path: Path) -> None:
    settings = {**SETTINGS, "formats": None}
    outcome = mpq.quantize(source, tmp_path / "out", kv_bits=5, kv_formats=CACHES, **settings)
    assert set(outcome.allocation.schemes) == {"fp32"}
    assert outcome.allocation.cache.bits <= 5


def request_of(source: Source, serving: Serving, **more: object) -> Request:
    return Request(source.model, serving, TARGETS.named("mpq"), **more)


def test_one_budget_is_predicted_no_worse_than_any_fixed_split(source: Source, table: mpq.SensitivityTable) -> None:
    held = restrict(table, TARGETS.named("mpq"))
    request = request_of(source, Serving(256, 8, 1.2e6))
    best = weights_within(held, request, splits(held, request)[0])
    assert best.memory(256, 8) <= 1.2e6
    for name in CACHES:
        cache = CacheFormats.uniform(table.entries, name)
        if cache.nbytes(256, 8) < 7e5:
            fixed = weights_within(held, request, cache)
            assert fixed.memory(256, 8) <= 1.2e6
            assert best.loss <= fixed.loss


def test_budgets_combine(source: Source, table: mpq.SensitivityTable) -> None:
    held = restrict(table, TARGETS.named("mpq"))
    both = request_of(source, Serving(256, 8, 1.2e6, kv_bits=3.5))
    (cache, *_) = splits(held, both)
    assert 3 < cache.bits <= 3.5
    capped = request_of(source, Serving(256, 8, 1.9e6), weights=5e5)
    (more, *_) = splits(held, capped)
    assert more.bits > splits(held, request_of(source, Serving(256, 8, 1.9e6)))[0].bits
    with pytest.raises(MpqError, match="within all budgets"):
        splits(held, request_of(source, Serving(256, 8, 4e5)))
    with pytest.raises(MpqError, match="matches nothing"):
        splits(held, request_of(source, Serving(256, 8, 1.2e6), pin={"nothing": "int8-channel"}))


def test_a_budget_of_seconds_counts_attention(source: Source, table: mpq.SensitivityTable) -> None:
    """A latency table in which attention takes as many seconds as its format has bits, and layers almost none."""
    layers = [Latency(name, 64, 64, 8, 1e-9) for name in table.weights().schemes]
    attention = [
        Latency(name, entry.rows, entry.cols, 8, float(parse_scheme(name).weight.grid.bits), entry.kind, 256)
        for name in table.schemes
        for entry in table.entries[:2]
        if parse_scheme(name).cached
    ]
    latencies = LatencyTable((*layers, *attention))
    held, serving = restrict(table, TARGETS.named("mpq")), Serving(256, 8, 1.9e6)
    free, limit = splits(held, request_of(source, serving))[0], 3.01 * len(table.entries)
    assert cache_seconds(free, latencies, 8, 256) > limit
    budgets = Budgets({"latency": limit}, latencies, batch=8, context=256)
    request = request_of(source, serving, budgets=budgets)
    for cache in splits(held, request):
        assert 0.7 * limit < cache_seconds(cache, latencies, 8, 256) <= limit
        chosen = weights_within(held, request, cache)
        assert chosen.memory(256, 8) <= 1.9e6
        assert budgets.keep(chosen)
        assert not replace(budgets, limits={"latency": limit / 2}).keep(chosen)
    choice = allocate(
        table, memory=1.9e6, context=256, batch=8, budgets={"latency": limit}, latencies=latencies
    ).allocation
    assert budgets.keep(choice)
    assert replace(budgets, limits={"latency": 0.1}, context=0).keep(choice)  # layers alone


def test_the_split_that_measures_best_is_taken(source: Source, table: mpq.SensitivityTable) -> None:
    held = restrict(table, TARGETS.named("mpq"))
    request = request_of(source, Serving(256, 8, 1.5e6))
    found = splits(held, request)
    assert len(found) > 1
    measurer = Measurer(source, store_for("mse", source, table.weights().layers))
    chosen = choose_cache(held, request, measurer)
    assert choose_cache(held, request, measurer, measured=False) == found[0]
    harms = {
        cache: float(measurer.quality(weights_within(held, request, cache), "search").harm.mean()) for cache in found
    }
    assert chosen == min(harms, key=harms.get)


def test_pins_of_the_cache_are_kept(source: Source, table: mpq.SensitivityTable) -> None:
    held = restrict(table, TARGETS.named("mpq"))
    request = request_of(source, Serving(256, 8, 1.9e6), pin={"cache.*.keys": "kv:int8-token", "embed": "int8-channel"})
    (cache, *_) = splits(held, request)
    assert set(cache.names[::2]) == {"int8-token"}
    assert "int8-token" not in cache.names[1::2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "name one budget"),
        ({"memory": "6GB"}, "give the context"),
        ({"bits": 4, "context": 0}, "expected at least one token"),
        ({"bits": 4, "context": 257}, "at most 256 tokens, not 257"),
        ({"memory": "6GB", "context": 257}, "at most 256 tokens, not 257"),
        ({"memory": "6GB", "context": 0}, "expected at least one token"),
        ({"memory": "6XB", "context": 10}, "invalid size"),
        ({"memory": "600kB", "context": 256, "batch": 8}, r"a context of \d+ tokens fits"),
        ({"memory": "200kB", "context": 256}, "raise it or add smaller"),
        ({"bits": 4, "kv_bits": 1.5}, "below the smallest formats"),
        ({"bits": 4, "kv_bits": -1}, "expected a positive number"),
        ({"bits": 4, "kv_bits": 4, "kv_formats": ["int9"]}, "unknown format"),
        ({"max_kl": 0.1, "memory": "6GB", "context": 10}, "name one budget"),
        ({"bits": 4, "kv_bits": 4, "target": "onnx"}, "cannot store cache formats"),
    ],
)
def test_impossible_budgets_are_refused_before_any_work(
    source: Source, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(MpqError, match=sentence):
        mpq.quantize(source, tmp_path / "out", **{"formats": FORMATS, **settings})
    assert not (tmp_path / "out").exists()


def test_a_model_or_table_without_a_cache_is_refused(source: Source, tmp_path: Path) -> None:
    batches = images()
    cnn = mpq.Source("mine", small_cnn(), batches, batches, cross_entropy)
    with pytest.raises(MpqError, match="has no cache of keys and values"):
        mpq.quantize(cnn, tmp_path / "out", memory="6GB", context=10)
    plain = profile(source.model, source.calibration, source.loss_fn, FORMATS, metric="fisher", progress=False)
    with pytest.raises(MpqError, match="the table has no keys and values"):
        mpq.quantize(source, tmp_path / "out", memory="6GB", context=10, table=plain)


def test_the_default_context_is_the_models(source: Source) -> None:
    serving = serving_of(source, None, 4.0, None, 1)
    assert serving == Serving(256, 1, None, 4.0)
    assert torch.is_tensor(source.calibration[0][0])
