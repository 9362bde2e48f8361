"""Scores of KV-cache entries against measured divergence."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mpq
from mpq.core.cache import parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.evaluation import Reference
from mpq.network.cached import changing, find_cached
from mpq.network.calibration import first_samples
from mpq.quantized import CacheRounding
from mpq.sensitivity.profile import profile
from mpq.sources import Source, open_source

FORMATS = ("int2-asym", "int3-asym", "int4-asym", "fp16")


@pytest.fixture(scope="module")
def source() -> Source:
    torch.set_num_threads(1)
    return open_source("tiny-lm", nsamples=16, seqlen=128)


@pytest.fixture(scope="module")
def table(source: Source) -> mpq.SensitivityTable:
    return profile(
        source.model, source.calibration, source.loss_fn, ["int4-channel", "int8-channel"], metric="fisher",
        progress=False, cache=FORMATS,
    )  # fmt: skip


def test_scores_rank_entries_as_measuring_them_does(source: Source, table: mpq.SensitivityTable) -> None:
    entries = table.entries
    assert len(entries) == 12
    assert entries == find_cached(source.model, first_samples(source.calibration, 1)[0], source.loss_fn)
    reference = Reference(source.model, first_samples(source.evaluation, 8), source.kind, source.loss_fn)
    scores = table.scores[-12:, -4:]
    measured = []
    for entry in entries:
        with changing(source.model, CacheRounding(CacheFormats((entry,), ("int2-asym",)))):
            measured.append(reference.measure(source.model).divergence.mean()[0])
    assert np.corrcoef(np.argsort(np.argsort(scores[:, 0])), np.argsort(np.argsort(measured)))[0, 1] > 0.9
    assert 0.6 < scores[:, 0].sum() / sum(measured) < 1.3
    assert (np.diff(scores, axis=1) < 0).all()
    assert (table.errors[-12:, -4:] < 0.5 * scores).all()


def test_weights_and_cache_entries_have_separate_schemes(table: mpq.SensitivityTable) -> None:
    assert table.schemes[-4:] == ("kv:int2-token-asym", "kv:int3-token-asym", "kv:int4-token-asym", "kv:fp16")
    assert np.isnan(table.scores[-12:, :2]).all()
    assert np.isnan(table.scores[:-12, 2:]).all()
    assert np.isfinite(table.weights().scores).all()
    assert not table.weights().entries


def test_a_table_with_entries_is_saved_and_resumed(source: Source, table: mpq.SensitivityTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.csv")
    assert mpq.SensitivityTable.load(tmp_path / "table.csv") == table
    again = profile(
        source.model, source.calibration, source.loss_fn, ["int4-channel", "int8-channel"], metric="fisher",
        progress=False, cache=FORMATS, resume=tmp_path / "journal",
    )  # fmt: skip
    assert again == table


def test_one_budget_gives_memory_to_weights_and_cache(table: mpq.SensitivityTable) -> None:
    context, batch = 4096, 2
    frontier = mpq.frontier(table, cost="memory", context=context, batch=batch)
    for index in (0, len(frontier) // 2, len(frontier) - 1):
        found = frontier.allocation(index)
        assert found.cache is not None
        assert found.size + found.cache.nbytes(context, batch) == frontier.costs[index]
        assert len(found.layers) == len(table.layers) - 12
    middle = frontier.costs[len(frontier) // 2]
    best = frontier.at(cost=middle)
    for name in table.schemes[:2]:
        for cached in FORMATS:
            cache = CacheFormats.uniform(table.entries, cached)
            split = mpq.frontier(table, pin={"*": name}, cache=cache).allocation(0)
            assert split.cache == cache
            places = [table.schemes.index(name), table.schemes.index(f"kv:{cached.replace('-asym', '-token-asym')}")]
            loss = table.scores[:-12, places[0]].sum() + table.scores[-12:, places[1]].sum()
            if split.memory(context, batch) - split.overhead <= middle:
                assert best.loss <= loss + 1e-12
    assert best.cache.tokens_in(best.cache.nbytes(context, batch), batch) == context
    assert mpq.frontier(table).allocation(0).cache is None


def test_pins_of_keys_leave_weights_alone(table: mpq.SensitivityTable) -> None:
    pins = {"cache.*.keys": "kv:int4-asym", "*": "int8-channel"}
    found = mpq.frontier(table, pin=pins, cost="memory", context=10).allocation(0)
    assert set(found.schemes) == {"int8-channel"}
    assert {
        name for entry, name in zip(found.cache.entries, found.cache.names, strict=True) if entry.kind == "keys"
    } == {"int4-token-asym"}
    assert found.cache.names[1] == "int2-token-asym"


def test_an_allocation_with_a_cache_is_saved_and_simulated(
    source: Source, table: mpq.SensitivityTable, tmp_path: Path
) -> None:
    found = mpq.frontier(table, cost="memory", context=4096).allocation(0)
    found.save(tmp_path / "allocation.json")
    assert mpq.Allocation.load(tmp_path / "allocation.json") == found
    batch = first_samples(source.calibration, 2)[0]
    floats = mpq.simulate(source.model, found.with_cache(None), trainable=False)
    simulated = mpq.simulate(source.model, found, trainable=False)
    plain, rounded = (float(source.loss_fn(one, batch).detach()) for one in (floats, simulated))
    assert rounded != plain
    trainable = mpq.simulate(source.model, found)
    loss = source.loss_fn(trainable, batch)
    assert float(loss.detach()) == pytest.approx(rounded, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for name, p in trainable.named_parameters() if "k_proj" in name)
    with changing(floats, CacheRounding(found.cache)), torch.no_grad():
        assert float(source.loss_fn(floats, batch)) == rounded


def test_windows_bound_what_a_cache_takes() -> None:
    entry = mpq.core.layer.Layer("cache.0.keys", "keys", 2, 64, window=100)
    both = CacheFormats((entry, mpq.core.layer.Layer("cache.1.keys", "keys", 2, 64)), ("fp16", "int8-token"))
    assert both.nbytes(1000, 3) == 3 * (100 * 2 * 128 + 1000 * 2 * 66)
    assert both.tokens_in(both.nbytes(1000, 3), 3) == 1000
    assert both.tokens_in(both.nbytes(1000, 3) - 1, 3) == 999
    assert CacheFormats((entry,), ("fp16",)).tokens_in(1e9) == -1
    assert parse_cache_format(both.names[1]).grid.bits == 8
