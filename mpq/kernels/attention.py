"""torch.ops.mpq.attend and append: attention of the newest token of several sequences to caches in blocks of 64 tokens.

    attend(query (sequences, heads, width), keys, values, lengths, key_format, value_format, query_format, scale,
        window, sinks (heads,) or None) -> (sequences, heads, width) in the query's type
    append(vectors (sequences, key heads, tokens, width), slabs, format, values, positions): round tokens into the slabs

`keys` and `values` are slabs, uint8 (key heads, blocks, bytes) as `mpq.kernels.blocks` arranges them, of one sequence
after the other, the same number for each. A sequence attends to the newest `window` of its `lengths` tokens (0: all).
`sinks` are scores without a value: they only enlarge the softmax's denominator. `query_format` is "" or the format that
queries are rounded to first. With `TokenBlocks`, a sequence's first slab holds the newest tokens, which do not fill a
block yet, as floats (key heads, 64, width). The reference dequantizes everything and multiplies; a backend adds its
kernels for a device type to `KERNELS` and `APPENDS`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpq.core.cache import parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.kernels import blocks, reference
from mpq.kernels.gpu import backend as gpu
from mpq.kernels.kv_cache import quantize_heads
from mpq.kernels.ops import LIBRARY, check_floats

SCHEMA = (
    "attend(Tensor query, Tensor[] keys, Tensor[] values, int[] lengths, str key_format, str value_format, "
    "str query_format, float scale, int window, Tensor? sinks) -> Tensor"
)
APPEND = "append(Tensor vectors, Tensor(a!)[] slabs, str format, bool values, int[] positions) -> ()"
APPENDS: dict[str, Callable[..., None]] = {}  # as KERNELS, for `append_plainly`
# By device type, with the signature of `attend_plainly`
KERNELS: dict[str, Callable[..., Tensor]] = {"cuda": gpu.attend}


def attend_plainly(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], key_format: str,
    value_format: str, query_format: str, scale: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The plain reference of `attend`: restore, multiply, softmax, in float32."""
    q = reference.quantize_activation(query, query_format) if query_format else query
    outputs = []
    for index, length in enumerate(lengths):
        seen = slice(max(0, length - window) if window else 0, length)
        own = [slabs_of(slabs, index, len(lengths)) for slabs in (keys, values)]
        k = numbers_of(own[0], key_format, query.shape[2], False, length)[:, seen]
        v = numbers_of(own[1], value_format, query.shape[2], True, length)[:, seen]
        grouped = q[index].float().reshape(len(k), -1, query.shape[2])
        scores = grouped @ k.transpose(1, 2) * scale
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().reshape(len(k), -1, 1)], 2)
        mixed = scores.softmax(-1)[..., : v.shape[1]] @ v
        outputs.append(mixed.reshape(query.shape[1:]))
    return torch.stack(outputs).to(query.dtype)


def slabs_of(slabs: Sequence[Tensor], index: int, sequences: int) -> Sequence[Tensor]:
    """The slabs of one of several sequences, which all have the same number."""
    each = len(slabs) // sequences
    return slabs[index * each : (index + 1) * each]


def numbers_of(slabs: Sequence[Tensor], format: str, width: int, values: bool, length: int) -> Tensor:
    """The first `length` tokens of a cache, float32 (key heads, length, width)."""
    parsed = parse_cache_format(format)
    newest, held = blocks.parted(slabs, parsed)
    numbers = torch.cat([blocks.numbers_of(slab, parsed, width, values) for slab in held], 1)
    if newest is None:
        return numbers[:, :length]
    filled = length - length % blocks.TOKENS
    return torch.cat([numbers[:, :filled], newest[:, : length - filled].float()], 1)


def append_plainly(
    vectors: Tensor, slabs: Sequence[Tensor], format: str, values: bool, positions: Sequence[int]
) -> None:
    """The plain reference of `append`: the blocks concerned are restored, changed and arranged again."""
    parsed = parse_cache_format(format)
    for index, (own, position) in enumerate(zip(vectors, positions, strict=True)):
        newest, held = blocks.parted(slabs_of(slabs, index, len(positions)), parsed)
        if newest is None:
            _append_vectors(own, held, parsed, values, position)
        else:
            _append_blocks(own, newest, held, parsed, values, position)


def _append_vectors(vectors: Tensor, slabs: Sequence[Tensor], format: Format, values: bool, position: int) -> None:
    _, tokens, width = vectors.shape
    new, start = quantize_heads(vectors.unsqueeze(0), format), 0
    for slab in slabs:
        end = start + slab.shape[1] * blocks.TOKENS
        first, last = max(position, start), min(position + tokens, end)
        if first < last:
            touched = slab[:, (first - start) // blocks.TOKENS : -(-(last - start) // blocks.TOKENS)]
            present = blocks.restore(touched, format, width, values)
            offset = (first - start) % blocks.TOKENS
            for old, own in zip(present.tensors, new.tensors, strict=True):
                old[:, :, offset : offset + last - first] = own[:, :, first - position : last - position]
            touched.copy_(blocks.arrange(present, values))
        start = end


def _append_blocks(
    vectors: Tensor, newest: Tensor, slabs: Sequence[Tensor], format: Format, values: bool, position: int
) -> None:
    """`append` for `TokenBlocks`, which are rounded once they are full."""
    for vector in vectors.unbind(1):
        newest[:, position % blocks.TOKENS] = vector
        position += 1
        if position % blocks.TOKENS:
            continue
        place = position // blocks.TOKENS - 1
        for slab in slabs:
            if 0 <= place < slab.shape[1]:
                slab[:, place] = blocks.packed_blocks(newest, format, values)[:, 0]
            place -= slab.shape[1]


def check_slabs(slabs: Sequence[Tensor], format: str, width: int) -> None:
    """MpqError for slabs that do not hold vectors of this format and width."""
    parsed = parse_cache_format(format)
    if not blocks.supports(parsed, width):
        raise MpqError(
            f"a cache of {format} cannot be stored in blocks: its groups are not multiples of {blocks.LANES}, or its "
            f"blocks are not of {blocks.TOKENS} tokens"
        )
    expected = blocks.block_bytes(parsed, width)
    newest, slabs = blocks.parted(slabs, parsed)
    if newest is not None and (newest.shape[1:] != (blocks.TOKENS, width) or not newest.is_floating_point()):
        raise MpqError(f"invalid shape of a first slab: expected floats (key heads, 64, {width}) for {format}")
    if any(slab.ndim != 3 or slab.dtype != torch.uint8 or slab.shape[2] != expected for slab in slabs):
        raise MpqError(f"invalid shape of slabs: expected uint8 (key heads, blocks, {expected}) for {format}")


def check_call(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int],
               key_format: str, value_format: str) -> None:  # fmt: skip
    """MpqError for tensors that do not fit each other."""
    check_floats(query)
    if query.ndim != 3 or len(lengths) != len(query) or not lengths:
        raise MpqError(f"invalid queries of shape {tuple(query.shape)} for {len(lengths)} sequences: expected one each")
    for slabs, format in ((keys, key_format), (values, value_format)):
        if not slabs or len(slabs) % len(lengths) or any(query.shape[1] % len(slab) for slab in slabs):
            raise MpqError(
                f"invalid number of slabs: {len(slabs)} for {len(lengths)} sequences and {query.shape[1]} heads"
            )
        for index, length in enumerate(lengths):
            own = slabs_of(slabs, index, len(lengths))
            check_slabs(own, format, query.shape[2])
            held = blocks.TOKENS * sum(slab.shape[1] for slab in blocks.parted(own, parse_cache_format(format))[1])
            if not 0 < length <= held:
                raise MpqError(f"invalid length {length} of a cache of {held} tokens: expected 1 to {held}")


def _attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], key_format: str,
    value_format: str, query_format: str, scale: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    check_call(query, keys, values, lengths, key_format, value_format)
    kernel = KERNELS.get(query.device.type, attend_plainly)
    return kernel(query, keys, values, lengths, key_format, value_format, query_format, scale, window, sinks)


def _append(vectors: Tensor, slabs: Sequence[Tensor], format: str, values: bool, positions: Sequence[int]) -> None:
    check_floats(vectors)
    if vectors.ndim != 4 or len(positions) != len(vectors) or not slabs or len(slabs) % max(len(vectors), 1):
        raise MpqError(
            f"invalid vectors of shape {tuple(vectors.shape)} with {len(slabs)} slabs for {len(positions)} sequences: "
            "expected (sequences, key heads, tokens, width), and the same number of slabs for each"
        )
    for index, position in enumerate(positions):
        own = slabs_of(slabs, index, len(positions))
        check_slabs(own, format, vectors.shape[-1])
        room = blocks.TOKENS * sum(slab.shape[1] for slab in blocks.parted(own, parse_cache_format(format))[1])
        if any(len(slab) != vectors.shape[1] for slab in own):
            raise MpqError(f"invalid vectors of shape {tuple(vectors.shape)}: expected as many heads as the slabs have")
        if not 0 <= position <= room - vectors.shape[2]:
            raise MpqError(
                f"cannot append {vectors.shape[2]} tokens at {position} to a cache of {room}: add a slab first"
            )
    if vectors.numel():
        APPENDS.get(vectors.device.type, append_plainly)(vectors, slabs, format, values, positions)


def _shape(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("mpq::attend", _shape, lib=LIBRARY)
LIBRARY.define(APPEND, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("append", _append, "CompositeExplicitAutograd")
torch.library.register_fake("mpq::append", lambda *arguments: None, lib=LIBRARY)
