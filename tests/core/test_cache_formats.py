"""The formats of a cache: bytes entry by entry, the longest text that fits, and their JSON form."""

from dataclasses import replace

import numpy as np
import pytest

from mpq.core.allocation import Allocation
from mpq.core.cache import CACHE_FORMATS, head_bytes, parse_cache_format, stored_bytes
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import Layer


def made(seed: int, windows: tuple[int, ...] = (0, 40, 100)) -> CacheFormats:
    random = np.random.default_rng(seed)
    entries = tuple(
        Layer(
            f"cache.{i}.{kind}", kind, int(random.integers(1, 4)), int(random.choice([32, 64])),
            window=int(random.choice(windows)),
        )
        for i in range(3) for kind in ("keys", "values")
    )  # fmt: skip
    return CacheFormats(entries, tuple(random.choice(CACHE_FORMATS, len(entries))))


@pytest.mark.parametrize("seed", range(8))
def test_bytes_are_summed_over_entries(seed):
    cache = made(seed)
    formats = [parse_cache_format(name) for name in cache.names]
    pairs = list(zip(cache.entries, formats, strict=True))
    assert list(cache.format_of.items()) == [(entry.name, format) for entry, format in pairs]
    assert cache.token_bytes == sum(entry.rows * head_bytes(format, entry.cols) for entry, format in pairs)
    assert cache.bits == cache.token_bytes * 8 / sum(entry.rows * entry.cols for entry in cache.entries)
    for context in (1, 39, 64, 500):
        kept = [min(context, entry.window or context) for entry in cache.entries]
        texts = [
            entry.rows * stored_bytes(format, entry.cols, own) for (entry, format), own in zip(pairs, kept, strict=True)
        ]
        assert cache.nbytes(context) == cache.nbytes(context, 1) == sum(texts)
        assert cache.nbytes(context, 7) == 7 * sum(texts)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("batch", [1, 3])
def test_longest_context_matches_linear_search(seed, batch):
    cache = made(seed)
    cache = replace(cache, entries=(replace(cache.entries[0], window=0), *cache.entries[1:]))
    sizes = [cache.nbytes(tokens, batch) for tokens in range(300)]
    for tokens in (0, 1, 2, 3, 41, 64, 130, 255):
        for memory in (sizes[tokens], sizes[tokens] - 1, sizes[tokens] + 1):
            longest = max((other for other, size in enumerate(sizes) if size <= memory), default=0)
            assert cache.tokens_in(memory, batch) == longest


def test_sliding_windows_can_allow_any_length():
    cache = made(1, windows=(16, 40))
    most = cache.nbytes(40)
    assert cache.nbytes(10**6) == most
    assert cache.tokens_in(most) == -1
    assert cache.tokens_in(most, batch=2) < 40
    assert cache.tokens_in(most - 1) == max(n for n in range(41) if cache.nbytes(n) < most)
    endless = replace(cache, entries=(*cache.entries[1:], replace(cache.entries[0], window=0)))
    assert endless.tokens_in(endless.nbytes(1000)) == 1000


def test_json_round_trip_and_wrong_counts():
    cache = made(2)
    assert CacheFormats.from_json(cache.to_json()) == cache
    assert CacheFormats.uniform(cache.entries, "int4").names == ("int4-token",) * 6
    with pytest.raises(MpqError, match="each of 6 entries, not 5"):
        CacheFormats(cache.entries, cache.names[:-1])


def test_allocation_memory_and_repr_include_the_cache(tmp_path):
    cache = CacheFormats.uniform(made(3, windows=(0,)).entries, "int4-asym")
    layer = Layer("a", "linear", 8, 64)
    plain = Allocation((layer,), ("int4-g64",), 0.5, metric="fisher")
    allocation = plain.with_cache(cache)
    assert plain.cache is None
    assert plain.total == plain.size == 8 * 34
    assert allocation.memory(100) == allocation.memory(100, 1) == plain.size + cache.nbytes(100)
    assert allocation.memory(100, 3) == plain.size + 3 * cache.nbytes(100)
    assert repr(plain) == "Allocation(1 layers at 4.250 bits, predicted loss +0.5: 1 x int4-g64)"
    assert repr(allocation) == f"Allocation(1 layers at 4.250 bits: 1 x int4-g64; cache at {cache.bits:.3f} bits)"
    assert repr(Allocation((layer,), ("int4-g64",), 2.0, metric="proxy:size")).count(", score 2:") == 1
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json").cache == cache
