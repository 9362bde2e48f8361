"""`mpq.allocate` with weights and cache in one budget, from a table alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from problems import every_choice

from mpq.cli.main import main
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.search.choice import allocate

CONTEXT, BATCH = 1000, 3


def table_of() -> SensitivityTable:
    random = np.random.default_rng(0)
    layers = tuple(Layer(f"l{i}", "linear", 256, 256, macs=256 * 256) for i in range(6))
    scores = random.random((6, 1)) * np.array([8.0, 2.0, 0.1])
    schemes = ("int2-g32", "int4-g32", "int8-channel")
    table = SensitivityTable(layers, schemes, scores, np.zeros((6, 3)), "kl-curvature", {"overhead": 1000})
    entries = tuple(Layer(f"cache.{i}.{kind}", kind, 2, 64) for i in range(3) for kind in ("keys", "values"))
    added = random.random((6, 1)) * np.array([4.0, 1.0, 0.05])
    return table.with_entries(entries, ("kv:int2-token-asym", "kv:int4-token-asym", "kv:int8-token"), added, added * 0)


def test_memory_is_one_budget() -> None:
    table = table_of()
    choice = allocate(table, memory=1.1e6, context=CONTEXT, batch=BATCH)
    assert choice.frontier.cost == "memory"
    assert choice.frontier.gap == 0
    assert 1.05e6 < choice.allocation.memory(CONTEXT, BATCH) <= 1.1e6
    more = allocate(table, memory="1.2MB", context=CONTEXT, batch=BATCH).allocation
    assert more.loss < choice.allocation.loss


def test_budgets_combine() -> None:
    table = table_of()
    both = allocate(table, memory=1.2e6, bits=3, context=CONTEXT, batch=BATCH).allocation
    assert both.bits <= 3
    assert both.memory(CONTEXT, BATCH) <= 1.2e6
    assert both.cache.bits > allocate(table, memory=1.2e6, context=CONTEXT, batch=BATCH).allocation.cache.bits
    cached = allocate(table, bits=4, kv_bits=4, context=CONTEXT).allocation
    assert cached.bits <= 4
    assert cached.cache.bits <= 4
    operations = allocate(table, memory=1.2e6, context=CONTEXT, batch=BATCH, budgets={"bitops": 2.5e7}).allocation
    assert operations.bitops <= 2.5e7
    plain = allocate(table, bits=4).allocation
    assert plain.cache is None
    assert plain == allocate(table.weights(), bits=4).allocation


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "give one budget"),
        ({"memory": 1e6}, "need the number of cached tokens"),
        ({"loss": 0.1, "memory": 1e6, "context": 10}, "give one budget"),
        ({"memory": 1e3, "context": CONTEXT}, "below the smallest allocation"),
        ({"kv_bits": 3, "context": 10}, "give one budget"),
    ],
)
def test_impossible_budgets_are_refused_by_name(request_: dict[str, float], sentence: str) -> None:
    with pytest.raises(MpqError, match=sentence):
        allocate(table_of(), **request_)


def test_tables_without_losses_or_entries_are_named() -> None:
    with pytest.raises(MpqError, match="has no keys and values"):
        allocate(table_of().weights(), memory=1e6, context=10)
    with pytest.raises(MpqError, match="does not score a cache"):
        allocate(replace(table_of(), metric="proxy:size"), memory=1e6, context=10)


def test_the_command_line_prints_entries_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table_of().save(tmp_path / "table.csv")
    arguments = ["allocate", str(tmp_path / "table.csv"), "--memory", "1.2MB", "--context", "1000", "--batch", "3"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "cache.2.values" in said
    assert "kv:int" in said
    assert "cache at" in said
    assert main(["allocate", str(tmp_path / "table.csv"), "--memory", "1.2MB"]) == 2
    assert "need the number of cached tokens" in capsys.readouterr().err
    assert main(["allocate", str(tmp_path / "table.csv"), "--bits", "4"]) == 0
    assert "cache" not in capsys.readouterr().out


def small(overhead: int | None) -> SensitivityTable:
    """Three layers in three schemes and two entries in two, each with a window of its own: 108 allocations."""
    random = np.random.default_rng(1)
    layers = tuple(Layer(f"l{i}", "linear", 16 * (i + 1), 64, macs=64) for i in range(3))
    scores = random.random((3, 1)) * np.array([9.0, 2.0, 0.3])
    provenance = {} if overhead is None else {"overhead": overhead}
    table = SensitivityTable(layers, ("int2-g32", "int4-g32", "int8-channel"), scores, 0 * scores, "loss", provenance)
    entries = (Layer("cache.0.keys", "keys", 2, 64, window=40), Layer("cache.0.values", "values", 1, 32))
    added = random.random((2, 1)) * np.array([4.0, 0.2])
    return table.with_entries(entries, ("kv:int3-asym", "kv:int8-token"), added, 0 * added)


@pytest.mark.parametrize("overhead", [None, 0, 3000])
@pytest.mark.parametrize("seed", range(6))
def test_every_combination_of_budgets_matches_enumeration(overhead: int | None, seed: int) -> None:
    table, random, context, batch = small(overhead), np.random.default_rng(seed), 100, 3
    problem = build_problem(table, context=context, batch=batch)
    every = [problem.allocation(choices) for choices in every_choice(problem)]
    numbers = sum(entry.params * entry.tokens(context) for entry in table.entries)
    costs = {
        "memory": [one.memory(context, batch) for one in every],
        "size": [one.total for one in every],
        "bits": [one.bits for one in every],
        "kv_bits": [8 * one.cache.nbytes(context) / numbers for one in every],
    }
    for names in (("memory",), ("memory", "size"), ("memory", "bits"), ("bits", "kv_bits"), ("size", "kv_bits")):
        budgets = {name: float(random.choice(costs[name])) for name in names}
        met = [all(costs[name][i] <= most * (1 + 1e-12) for name, most in budgets.items()) for i in range(len(every))]
        losses = [one.loss for one, fits in zip(every, met, strict=True) if fits]
        if not losses:
            with pytest.raises(MpqError):
                allocate(table, context=context, batch=batch, **budgets)
            continue
        found = allocate(table, context=context, batch=batch, **budgets).allocation
        assert found.loss == pytest.approx(min(losses))


def test_one_cached_token_is_enough() -> None:
    assert allocate(small(0), bits=4, kv_bits=5, context=1).allocation.cache is not None


@pytest.mark.parametrize("overhead", [None, 3000])
@pytest.mark.parametrize("search", ["exact", "integer"])
def test_budgets_of_weights_match_enumeration(overhead: int | None, search: str) -> None:
    table = small(overhead).weights()
    problem = build_problem(table)
    every = [problem.allocation(choices) for choices in every_choice(problem)]
    for one in every[::5]:
        for name, cost in (("bits", lambda own: own.bits), ("size", lambda own: own.total)):
            best = min(other.loss for other in every if cost(other) <= cost(one) * (1 + 1e-12))
            assert allocate(table, search=search, **{name: cost(one)}).allocation.loss == pytest.approx(best)
