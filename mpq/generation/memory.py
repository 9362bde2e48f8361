"""The key-value cache of the light loop: floats in one tensor, or formats packed in slabs of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.cache import TokenBlocks, parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.core.formats import Format
from mpq.core.layer import KEYS, VALUES
from mpq.kernels import blocks
from mpq.kernels.attention import numbers_of
from mpq.kernels.cpu import attention as cpu
from mpq.kernels.cpu.pages import empty_on_large_pages
from mpq.kernels.kv_cache import round_vectors
from mpq.kernels.token_blocks import whole
from mpq.network.cached import entry_name
from mpq.rounding.codes import COPY_DTYPES

_FLOATS = {dtype: name for name, dtype in COPY_DTYPES.items()}


@dataclass
class Memory:
    """Keys and values of each block, and the rotations.

    In floats each block has one tensor, (1, key heads, capacity, head width), which grows by copying. Packed ones have
    slabs as `torch.ops.mpq.attend` reads them, and grow by a further slab.
    """

    length: int = 0
    capacity: int = 0
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    formats: CacheFormats | None = None  # formats of keys and values; None: not rounded
    packed: bool = False  # whether the cache holds the formats' bytes
    rotations: tuple[Tensor, ...] = ()  # cosines and sines, (capacity, rotated width); the sines' first half negative
    local_rotations: tuple[Tensor, ...] = ()  # for blocks with local attention
    described: Any = None  # the cache as passed to compiled code, until it grows

    @property
    def nbytes(self) -> int:
        """Bytes of the cache for `capacity` tokens."""
        return sum(slab.nbytes for slabs in (*self.keys, *self.values) for slab in slabs)


def can_pack(formats: CacheFormats | None, width: int, device: torch.device) -> bool:
    """Whether a cache can be stored in blocks: on a CPU, if kernels read all of these formats."""
    if device.type != "cpu" or width > cpu.MAX_WIDTH:
        return False
    return formats is None or all(cpu.vectors_of(name, width) is not None for name in formats.names)


def names_of(memory: Memory, index: int, dtype: torch.dtype) -> tuple[str, str]:
    """Names of the formats of a block's keys and values; without one they are stored in the model's type."""
    given = memory.formats
    names = {} if given is None else {one.name: name for one, name in zip(given.entries, given.names, strict=True)}
    key, value = (names.get(entry_name(index, kind), _FLOATS.get(dtype, "")) for kind in (KEYS, VALUES))
    return key, value


def enlarge(memory: Memory, capacity: int) -> None:
    """Grow to this many tokens in all."""
    memory.described = None
    if memory.packed:
        capacity = -(-capacity // blocks.TOKENS) * blocks.TOKENS
    for parts in (memory.keys, memory.values):
        for slabs in parts:
            heads, size = slabs[-1].shape[0], slabs[-1].shape[2]
            if memory.packed:
                slabs.append(_slab(heads, (capacity - memory.capacity) // blocks.TOKENS, size))
                continue
            old = slabs[0]
            slabs[0] = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            slabs[0][:, :, : memory.length] = old[:, :, : memory.length]
    memory.capacity = capacity


def _slab(heads: int, count: int, size: int) -> Tensor:
    return empty_on_large_pages((heads, count, size), torch.uint8)


def _first_slabs(memory: Memory, format: Format, like: Tensor) -> list[Tensor]:  # (1, key heads, time, head width)
    """Slabs for the cache's capacity, preceded by the floats of the newest tokens of `TokenBlocks`."""
    heads, width = like.shape[1], like.shape[3]
    newest = [like.new_empty((heads, blocks.TOKENS, width))] if isinstance(format, TokenBlocks) else []
    return [*newest, _slab(heads, memory.capacity // blocks.TOKENS, blocks.block_bytes(format, width))]


def store(memory: Memory, index: int, k: Tensor, v: Tensor) -> None:  # (1, key heads, time, head width)
    """Write the next tokens' keys and values of a block, rounded to their formats."""
    first, last = memory.length, memory.length + k.shape[2]
    names = names_of(memory, index, k.dtype)
    for parts, new, name, values in ((memory.keys, k, names[0], False), (memory.values, v, names[1], True)):
        if memory.packed:
            if index == len(parts):
                parts.append(_first_slabs(memory, parse_cache_format(name), new))
            torch.ops.mpq.append(new, parts[index], name, values, [first])
            continue
        if index == len(parts):
            parts.append([new.new_empty((1, new.shape[1], memory.capacity, new.shape[3]))])
        buffer, format = parts[index][0], _format(memory, name, new)
        buffer[:, :, first:last] = new if isinstance(format, TokenBlocks) else _rounded(new, format)
        if isinstance(format, TokenBlocks):
            filled = slice(whole(first, format), whole(last, format))
            buffer[:, :, filled] = round_vectors(buffer[:, :, filled], format)


def store_each(
    memories: Sequence[Memory], index: int, k: Tensor, v: Tensor
) -> None:  # (sequences, key heads, 1, width)
    """As `store`, of one token of each of several sequences."""
    if not all(memory.packed for memory in memories):
        for place, memory in enumerate(memories):
            store(memory, index, k[place : place + 1], v[place : place + 1])
        return
    names, positions = names_of(memories[0], index, k.dtype), [memory.length for memory in memories]
    for slabs, new, name, values in zip(_slabs_of(memories, index), (k, v), names, (False, True), strict=True):
        torch.ops.mpq.append(new, slabs, name, values, positions)


def _format(memory: Memory, name: str, like: Tensor) -> Format | None:
    """The format that new vectors are rounded to; None for the model's own type."""
    return None if memory.formats is None or name == _FLOATS.get(like.dtype, "") else parse_cache_format(name)


def _rounded(vectors: Tensor, format: Format | None) -> Tensor:
    return vectors if format is None else round_vectors(vectors, format)


def attend(
    memory: Memory, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention of the last queries, (1, heads, time, width), whose keys and values are stored: (1, time,
    heads * width).
    """
    _, heads, time, width = q.shape
    last, names = memory.length + time, names_of(memory, index, k.dtype)
    if memory.packed and time == 1:
        mixed = torch.ops.mpq.attend(
            q.reshape(1, heads, width), memory.keys[index], memory.values[index], [last], *names, "",
            width**-0.5 if scale is None else scale, window or 0, None,
        )  # fmt: skip
        return mixed.reshape(1, 1, heads * width)  # type: ignore[no-any-return]
    if not memory.packed:
        past = [parts[index][0][:, :, :last] for parts in (memory.keys, memory.values)]
    elif not memory.length:
        past = [_rounded(new, _format(memory, name, new)) for new, name in ((k, names[0]), (v, names[1]))]
    else:
        past = [
            _read(memory.keys[index], names[0], last, k, False),
            _read(memory.values[index], names[1], last, v, True),
        ]
    return attend_floats(q, past[0], past[1], scale, window)


def attend_each(
    memories: Sequence[Memory], index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """As `attend`, of one token of each of several sequences: (sequences, 1, heads * width)."""
    count, heads, _, width = q.shape
    if not all(memory.packed for memory in memories):
        each = (slice(place, place + 1) for place in range(count))
        parts = [attend(memory, index, q[one], k[one], v[one], scale, window) for memory, one in
                 zip(memories, each, strict=True)]  # fmt: skip
        return torch.cat(parts)
    names, lengths = names_of(memories[0], index, k.dtype), [memory.length + 1 for memory in memories]
    mixed = torch.ops.mpq.attend(
        q.reshape(count, heads, width), *_slabs_of(memories, index), lengths, *names, "",
        width**-0.5 if scale is None else scale, window or 0, None,
    )  # fmt: skip
    return mixed.reshape(count, 1, heads * width)  # type: ignore[no-any-return]


def _slabs_of(memories: Sequence[Memory], index: int) -> list[list[Tensor]]:
    """Slabs of a block's keys and values, the same number for each sequence."""
    return [
        [slab for slabs in own for slab in _filled(slabs, max(map(len, own)))]
        for own in ([memory.keys[index] for memory in memories], [memory.values[index] for memory in memories])
    ]


def _filled(slabs: list[Tensor], count: int) -> list[Tensor]:
    """Slabs, with empty ones up to a count."""
    return slabs + [slabs[-1][:, :0]] * (count - len(slabs))


def _read(slabs: list[Tensor], name: str, last: int, like: Tensor, values: bool) -> Tensor:
    """The first tokens of a block's keys or values, (1, key heads, last, width), in the model's type."""
    return numbers_of(slabs, name, like.shape[3], values, last).unsqueeze(0).to(like.dtype)


def attend_floats(q: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of the last queries to (1, key heads, past, width), as (1, time, heads * width)."""
    _, heads, time, width = q.shape
    past = keys.shape[2]
    if window is not None and past > window + time - 1:  # tokens outside every query's window
        keys, values = (part[:, :, past - window - time + 1 :] for part in (keys, values))
        past = keys.shape[2]
    if time == 1:  # the query heads of a key head are rows of one product, so keys are not repeated
        grouped = q.view(1, keys.shape[1], -1, width)
        return functional.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(1, 1, heads * width)
    mask = None if past == time else q.new_ones((time, past), dtype=torch.bool).tril(past - time)
    if window is not None and past > window:
        mask = q.new_ones((time, past), dtype=torch.bool).tril(past - time).triu(past - time - window + 1)
    mixed = functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scale
    )
    return mixed.transpose(1, 2).reshape(1, time, heads * width)
