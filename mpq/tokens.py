"""Report of a cache: its formats, and how many tokens fit into a memory beside the weights."""

from collections import Counter

import numpy as np

from mpq.comparison import megabytes
from mpq.core.allocation import Allocation
from mpq.core.cache import FLOAT_CACHE
from mpq.core.cache_formats import CacheFormats
from mpq.core.frontier import Frontier
from mpq.core.layer import KEYS, VALUES
from mpq.memory import Serving

POINTS = 8  # points of the frontier in the table


def in_words(allocation: Allocation, serving: Serving, file_size: int) -> tuple[str, ...]:
    """Sentences on the cache: its formats and, for a memory budget, how many tokens fit."""
    cache = allocation.cache
    assert cache is not None
    kinds = {
        kind: Counter(n for e, n in zip(cache.entries, cache.names, strict=True) if e.kind == kind)
        for kind in (KEYS, VALUES)
    }
    formats = "; ".join(
        f"{kind} {', '.join(f'{count} x {name}' for name, count in counts.most_common())}"
        for kind, counts in kinds.items()
    )
    sentence = (
        f"Keys and values take {cache.bits:.4g} bits an element, {cache.token_bytes:,} bytes a token: {formats}. "
    )
    sentence += "All measured models cache in these formats, the original in floating point."
    return (sentence, tokens_within(allocation, serving, file_size)) if serving.memory is not None else (sentence,)


def tokens_within(allocation: Allocation, serving: Serving, file_size: int) -> str:
    """One sentence: how many tokens the memory holds, rounded and in floating point.

    >>> from mpq.core.layer import Layer
    >>> entry = Layer("cache.0.keys", "keys", 1, 64)
    >>> found = Allocation((), (), cache=CacheFormats((entry,), ("int8-token",)))
    >>> tokens_within(found, Serving(10, 2, 3320), 2000)
    'In 3,320 bytes, 2,000 of weights leave room for 10 tokens of each of 2 texts (8.25 bits), in fp16 for 5.'
    """
    cache = allocation.cache
    assert cache is not None
    assert serving.memory is not None
    room = serving.memory - file_size
    floats = CacheFormats.uniform(cache.entries, FLOAT_CACHE)
    texts = "a text" if serving.batch == 1 else f"each of {serving.batch} texts"
    held, plain = (_tokens(one.tokens_in(room, serving.batch)) for one in (cache, floats))
    return (
        f"In {serving.memory:,.0f} bytes, {file_size:,} of weights leave room for {held} tokens of {texts} "
        f"({cache.bits:.4g} bits), in {FLOAT_CACHE} for {plain}."
    )


def _tokens(count: int) -> str:
    return "any number of" if count < 0 else f"{count:,}"


def tokens_beside(allocation: Allocation, serving: Serving) -> int:
    """Tokens of each text that fit into the memory beside an allocation's weights; -1: unlimited."""
    assert allocation.cache is not None
    assert serving.memory is not None
    return allocation.cache.tokens_in(max(serving.memory - allocation.total, 0.0), serving.batch)


def tokens_table(frontier: Frontier, serving: Serving) -> list[tuple[str, ...]]:
    """A heading, and points of a frontier of weights with the tokens that fit beside each."""
    texts = "a text" if serving.batch == 1 else f"each of {serving.batch} texts"
    rows: list[tuple[str, ...]] = [("bits per weight", "size", "predicted", f"tokens of {texts}")]
    for index in np.unique(np.linspace(0, len(frontier) - 1, POINTS).round().astype(int)).tolist():
        allocation = frontier.allocation(index)
        tokens = _tokens(tokens_beside(allocation, serving))
        rows.append((f"{allocation.bits:.3f}", megabytes(allocation.total), f"{allocation.loss:.4g}", tokens))
    return rows
