"""Benchmark of attention to packed caches on this machine: seconds for keys and values in each format, by context."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import mpq.kernels.cpu.attention  # noqa: F401  (the op, and its kernel)
from mpq.core.cache import CACHE_FORMATS, TokenBlocks, cache_name, parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.latency import Latency
from mpq.core.layer import KEYS, VALUES
from mpq.core.scheme import Scheme
from mpq.kernels import blocks
from mpq.kernels.bench import BEYOND, CPU
from mpq.kernels.clock import Contestant, interleaved
from mpq.kernels.cpu.pages import empty_on_large_pages
from mpq.network.calibration import seeded

Heads: TypeAlias = tuple[int, int, int]  # query heads, key heads and width of a head
BESIDE = "int8-token"  # format of the values while keys are timed, and vice versa
REPEATED = 16 * blocks.TOKENS  # random tokens, repeated to fill a cache


@dataclass(frozen=True)
class AttentionTiming:
    """Median seconds of keys or values in a format in one token's attention in each of `batch` texts."""

    format: str
    kind: str  # "keys" or "values"
    heads: Heads
    context: int
    batch: int
    seconds: float
    nbytes: int  # read

    @property
    def latency(self) -> Latency:
        """The entry of the latency table."""
        scheme = Scheme(parse_cache_format(self.format), cached=True).name
        _, key_heads, width = self.heads
        return Latency(scheme, key_heads, width, self.batch, self.seconds, self.kind, self.context)


def cache_of(name: str, heads: Heads, tokens: int, values: bool) -> list[Tensor]:
    """A cache for `torch.ops.mpq.attend`: one slab that repeats `REPEATED` random tokens."""
    (_, key_heads, width), format = heads, parse_cache_format(name)
    random = torch.randn(key_heads, REPEATED, width, generator=seeded(0, "cache", values))
    piece = blocks.packed_blocks(random, format, values)
    slab = empty_on_large_pages((key_heads, -(-tokens // blocks.TOKENS), piece.shape[2]), torch.uint8)
    for start in range(0, slab.shape[1], piece.shape[1]):
        slab[:, start : start + piece.shape[1]] = piece[:, : slab.shape[1] - start]
    newest = [random[:, : blocks.TOKENS].half()] if isinstance(format, TokenBlocks) else []
    return [*newest, slab]


def attention_calls(
    keys: str, values: str, heads: Heads, context: int, batch: int = 1, *, beyond: int = BEYOND,
    device: torch.device = CPU, queries: str = "",
) -> tuple[int, Contestant]:  # fmt: skip
    """Bytes read, and calls of the op to time: copies of the caches fill `beyond` bytes, to defeat the cache."""
    count, _, width = heads
    query = torch.randn(batch, count, width, generator=seeded(1, "query", *heads)).to(device)
    caches = [cache_of(name, heads, context, which) for name, which in ((keys, False), (values, True))]
    nbytes = batch * sum(slab.nbytes for slabs in caches for slab in slabs)
    copies = [
        [
            [
                empty_on_large_pages(slab.shape, slab.dtype).copy_(slab).to(device)
                for _ in range(batch)
                for slab in slabs
            ]
            for slabs in caches
        ]
        for _ in range(max(2, beyond // nbytes))
    ]
    attend = torch.ops.mpq.attend.default
    calls = [
        partial(attend, query, *copy, [context] * batch, keys, values, queries, width**-0.5, 0, None) for copy in copies
    ]
    return nbytes, Contestant(calls)


def measure_attention(
    shapes: Sequence[Heads],
    contexts: Sequence[int] = (4096,),
    batches: Sequence[int] = (1,),
    formats: Sequence[str] = CACHE_FORMATS,
    *,
    repeats: int = 30,
    beyond: int = BEYOND,
    device: torch.device = CPU,
) -> Iterator[AttentionTiming]:
    """Time keys and values in each format, the other of the two in `BESIDE`, interleaved in one run.

    Half of the time with both in `BESIDE` is subtracted, so that the seconds of keys and values add up to those of a
    pair.

    Raises:
        MpqError: an unknown format, one without a kernel here, or an invalid shape or context.
    """
    names = [cache_name(parse_cache_format(name)) for name in formats]
    for heads in shapes:
        check_shape(heads, names)
        for context in contexts:
            if context < 1:
                raise MpqError(f"invalid context {context}: expected at least one token")
            for batch in batches:
                yield from _measured(heads, context, batch, names, repeats, beyond, device)


def check_shape(heads: Heads, names: Sequence[str]) -> None:
    """MpqError for an invalid shape, or formats without a kernel for it."""
    count, key_heads, width = heads
    if min(heads) < 1 or count % key_heads:
        raise MpqError(
            f"invalid attention {count}x{key_heads}x{width}: expected heads x key heads x width, as 32x8x128"
        )
    for name in names:
        if not blocks.supports(parse_cache_format(name), width):
            raise MpqError(f"no kernel reads {name} with heads of width {width}: leave it out")


def _measured(
    heads: Heads, context: int, batch: int, names: Sequence[str], repeats: int, beyond: int, device: torch.device
) -> Iterator[AttentionTiming]:
    pairs = [(BESIDE, BESIDE)] + [pair for name in names for pair in ((name, BESIDE), (BESIDE, name))]
    timed = [attention_calls(*pair, heads, context, batch, beyond=beyond, device=device) for pair in pairs]
    (first, *rest) = (statistics.median(times) for times in interleaved([calls for _, calls in timed], repeats, device))
    both = timed[0][0]
    for place, name in enumerate(names):
        for kind, at in ((KEYS, 2 * place), (VALUES, 2 * place + 1)):
            seconds = max(rest[at] - first / 2, 0.0)
            yield AttentionTiming(name, kind, heads, context, batch, seconds, timed[at + 1][0] - both // 2)
