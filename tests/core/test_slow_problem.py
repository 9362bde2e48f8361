"""Problems of random tables, with ties, pins, bans, keys and values, against loops over single layers."""

from itertools import product

import numpy as np
import pytest

from mpq.core.cache import head_bytes, stored_bytes
from mpq.core.cache_formats import CacheFormats
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable

WEIGHTS, CACHED = ("int3-g32", "int4-channel+a:int8-token", "bf16"), ("kv:int4-token-asym", "kv:int8-token")
CONTEXT, BATCH = 70, 3


def made(random: np.random.Generator) -> SensitivityTable:
    """Six layers, of which some are tied and one cannot take a scheme, and keys and values of two."""
    ties = random.choice(["", "a", "b"], 6).tolist()
    layers = tuple(
        Layer(f"l{i}", "linear", int(random.integers(1, 20)), int(random.integers(1, 90)), i, tie)
        for i, tie in enumerate(ties)
    )
    scores = random.normal(size=(6, 3))
    scores[int(random.integers(6)), int(random.integers(3))] = np.nan
    table = SensitivityTable(layers, WEIGHTS, scores, random.random((6, 3)), "fisher", {"overhead": 77, "seed": 1})
    entries = tuple(
        Layer(f"cache.{i}.{kind}", kind, 2, 32, tie="both" if tied else "", window=50 * i)
        for tied in [random.random() < 0.5] for i in range(2) for kind in ("keys", "values")
    )  # fmt: skip
    return table.with_entries(entries, CACHED, random.random((4, 2)), random.random((4, 2)))


def restrictions(table: SensitivityTable, random: np.random.Generator) -> tuple[dict[str, str], dict[str, str]]:
    """A pin and a ban of layers alone, which leave a scheme to each."""
    alone = [
        layer.name for i, layer in enumerate(table.layers) if not layer.tie and np.isfinite(table.scores[i, :3]).all()
    ]
    pinned, banned = random.permutation([*alone, ""])[:2].tolist() if alone else ("", "")
    pin = {pinned: str(random.choice(WEIGHTS))} if pinned else {}
    return {**pin, "*.keys": CACHED[1]}, {banned: "int*"} if banned else {}


@pytest.mark.parametrize("seed", range(60))
def test_group_losses_and_costs_are_sums_over_layers(seed):
    random = np.random.default_rng(seed)
    table, context, ties = made(random), CONTEXT * (seed % 2), seed % 4 < 3
    if any(layer.tie == "both" for layer in table.layers) and ties:
        pin, forbid = {}, {}
    else:
        pin, forbid = restrictions(table, random)
    problem = build_problem(table, pin=pin, forbid=forbid, ties=ties, context=context, batch=BATCH)
    rows = [i for i, layer in enumerate(table.layers) if context or not layer.is_cached]
    schemes = [name for name in table.schemes if context or not name.startswith("kv:")]
    layers = [table.layers[i] for i in rows]
    assert (problem.layers, problem.schemes) == (tuple(layers), tuple(schemes))

    groups: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        groups.setdefault(f"tie {layer.tie}" if ties and layer.tie else f"alone {layer.name}", []).append(place)
    assert problem.groups == tuple(map(tuple, groups.values()))
    assert problem.weights == sum(layer.params for layer in layers if not layer.is_cached)

    for (group, members), (column, name) in product(enumerate(groups.values()), enumerate(schemes)):
        own, scheme = [layers[place] for place in members], parse_scheme(name)
        loss = variance = size = cache = bitops = 0.0
        for place, layer in zip(members, own, strict=True):
            allowed = pin.get(layer.name, name) == name and not (layer.kind == "keys" and pin and name != CACHED[1])
            allowed = allowed and not (layer.name in forbid and name.startswith("int"))
            score = table.scores[rows[place], table.schemes.index(name)]
            loss += score if allowed and not np.isnan(score) else np.inf
            variance += table.errors[rows[place], table.schemes.index(name)] ** 2
            if layer.is_cached and scheme.cached:
                cache += BATCH * layer.rows * stored_bytes(scheme.weight, layer.cols, layer.tokens(context))
            if not layer.is_cached:
                size += (
                    layer.rows * head_bytes(scheme.weight, layer.cols)
                    if scheme.cached
                    else scheme.weight.nbytes(layer.rows, layer.cols)
                )
            bits = 16 if scheme.activation is None else scheme.activation.grid.bits
            bitops += layer.macs * scheme.weight.grid.bits * bits
        assert problem.losses[group, column] == pytest.approx(loss, rel=1e-12)
        if np.isfinite(loss):
            assert problem.variances[group, column] == pytest.approx(variance, rel=1e-12)
        found = {key: float(cost[group, column]) for key, cost in problem.costs.items()}
        more = {"cache": cache, "memory": size + cache} if context else {}
        assert found == {"size": size, "bitops": bitops, **more}
        assert problem.group_name(group) == (own[0].tie if len(own) > 1 else own[0].name)
    check_uniform(problem, table)


def check_uniform(problem, table):
    """Every pair of schemes that all weights and all entries can take, and what its allocation says."""
    cached = [problem.layers[group[0]].is_cached for group in problem.groups]
    options = [
        [
            name for column, name in enumerate(problem.schemes)
            if all(np.isfinite(row[column]) for row, own in zip(problem.losses, cached, strict=True) if own == kind)
        ]
        for kind in (False, True)
    ]  # fmt: skip
    pairs = (
        [(one, other) for one in options[0] for other in options[1]]
        if any(cached)
        else [(one, "") for one in options[0]]
    )
    found = problem.uniform()
    assert [name for name, _ in found] == [f"{one} + {other}" if other else one for one, other in pairs]
    for (_, allocation), (one, other) in zip(found, pairs, strict=True):
        weights = [layer for layer in problem.layers if not layer.is_cached]
        entries = tuple(layer for layer in problem.layers if layer.is_cached)
        assert allocation.layers == tuple(weights)
        assert set(allocation.schemes) == {one}
        assert allocation.cache == (CacheFormats.uniform(entries, other.removeprefix("kv:")) if entries else None)
        taken = [
            (table.layers.index(layer), table.schemes.index(other if layer.is_cached else one))
            for layer in problem.layers
        ]
        assert allocation.loss == pytest.approx(sum(table.scores[cell] for cell in taken))
        assert allocation.error == pytest.approx(sum(table.errors[cell] ** 2 for cell in taken) ** 0.5)
        assert (allocation.overhead, allocation.metric, allocation.provenance["seed"]) == (77, "fisher", 1)


@pytest.mark.parametrize("seed", range(4))
def test_cache_formats_add_the_losses_of_known_entries(seed):
    table = made(np.random.default_rng(seed))
    entries = table.entries
    cache = CacheFormats(
        (*entries, Layer("cache.9.keys", "keys", 2, 32)), ("int4-asym", "int8", "int4-asym", "int3", "int8")
    )
    problem = build_problem(table, cache=cache)
    cells = [(6, 3), (7, 4), (8, 3)]  # the fourth entry's format has no score, the fifth entry none at all
    assert problem.cache_loss[0] == pytest.approx(sum(table.scores[cell] for cell in cells))
    assert problem.cache_loss[1] == pytest.approx(sum(table.errors[cell] ** 2 for cell in cells))
    assert build_problem(table).cache_loss == (0, 0)
    choices = np.argmin(problem.losses, 1)
    bare = build_problem(table)
    assert problem.allocation(choices).cache == cache
    assert bare.allocation(choices).cache is None
    assert problem.allocation(choices).loss == pytest.approx(bare.allocation(choices).loss + problem.cache_loss[0])
