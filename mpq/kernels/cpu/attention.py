"""The compiled CPU kernels of torch.ops.mpq.attend and append: src/attention.c and append.c."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.cache import TokenBlocks, parse_cache_format
from mpq.kernels import attention, blocks, reference
from mpq.kernels.cpu import abi, panels
from mpq.kernels.cpu import native as cpu
from mpq.rounding.codes import SCALE_DTYPES

INT8_QUERIES = "int8-channel"  # rounded by the kernel itself
MAX_WIDTH = 256  # head width whose products fit 32 bits
NEWEST = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as ELEMENTS
ELEMENTS = {"fp32": 0, "fp16": 1, "bf16": 2, "e4m3": 4}  # as src/abi.h numbers MPQ_SCALE_*


@lru_cache(maxsize=256)
def vectors_of(format_name: str, width: int, newest: torch.dtype = torch.float32) -> abi.Vectors | None:
    """A cache format as passed to the library; None if it has no kernel.

    `newest` is the type of the tokens that do not fill a block yet, for `TokenBlocks`.
    """
    format = parse_cache_format(format_name)
    if not blocks.supports(format, width) or (format.scale and format.scale not in cpu.SCALE_KINDS):
        return None
    by_column = isinstance(format, TokenBlocks)
    if by_column and newest not in NEWEST:
        return None
    scaled = blocks.scale_groups(format, width) > 0
    kind = cpu.SCALE_KINDS.index(format.scale) if scaled else 0
    scale_bytes = SCALE_DTYPES[format.scale].itemsize if scaled else 0
    group = format.group_size if format.granularity == "group" else blocks.padded(width)
    rest = (group, kind, scale_bytes, bool(format.minimum), by_column, NEWEST.get(newest, 0))
    if blocks.in_rows(format):
        if format.grid.name not in ELEMENTS or blocks.scale_groups(format, width) > 1 or format.minimum:
            return None
        return abi.Vectors(None, width, ELEMENTS[format.grid.name], format.grid.bits // 8, *rest)
    levels, columns = panels.levels_of(format.grid), blocks.padded(width)
    if levels is None or levels.kind not in (panels.INTEGER, panels.TABLE8):
        return None
    weight = abi.Weight(
        rows=blocks.TOKENS, cols=columns, bits=format.grid.bits, kind=levels.kind, offset=levels.offset, group=columns,
        segment=columns, segments=1, tiles=1, factor=levels.factor, low=abi.Table(*levels.low),
    )  # fmt: skip
    return abi.Vectors(ctypes.pointer(weight), width, 0, 0, *rest)


def slabs_of(slabs: Sequence[Tensor]) -> ctypes.Array[abi.Slab]:
    """Slabs as passed to the library; the caller keeps the tensors alive."""
    structs = [abi.Slab(slab.data_ptr(), slab.shape[1], slab.stride(0) * slab.itemsize) for slab in slabs]
    return (abi.Slab * len(structs))(*structs)


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], key_format: str,
    value_format: str, query_format: str, scale: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """torch.ops.mpq.attend on a CPU."""
    loaded, width = cpu.native(), query.shape[2]
    formats = [vectors_of(name, width, slabs[0].dtype) for name, slabs in ((key_format, keys), (value_format, values))]
    fits = all(slab.stride()[1:] == (slab.shape[2], 1) for slab in (*keys, *values)) and width <= MAX_WIDTH
    if loaded is None or not all(formats) or not fits:
        return attention.attend_plainly(
            query, keys, values, lengths, key_format, value_format, query_format, scale, window, sinks
        )
    planes = 2
    if query_format == INT8_QUERIES and formats[0] is not None and formats[0].weight and not formats[0].by_column:
        planes = 1
    elif query_format:
        query = reference.quantize_activation(query, query_format)
    q = query.float().contiguous()
    out = torch.empty_like(q)
    sinks = None if sinks is None else sinks.float().contiguous()
    described = [slabs_of(slabs) for slabs in (keys, values)]
    size = q.stride(0) * 4
    sequences = [
        abi.Sequence(q.data_ptr() + index * size, out.data_ptr() + index * size, *(
            ctypes.cast(
                ctypes.byref(slabs, index * (len(slabs) // len(lengths)) * ctypes.sizeof(abi.Slab)),
                ctypes.POINTER(abi.Slab),
            )
            for slabs in described
        ), length)
        for index, length in enumerate(lengths)
    ]  # fmt: skip
    call = abi.Attention(
        ctypes.pointer(formats[0]), ctypes.pointer(formats[1]), (abi.Sequence * len(sequences))(*sequences),
        len(sequences), query.shape[1], len(keys[0]), window, 0 if sinks is None else sinks.data_ptr(), scale, planes,
        torch.get_num_threads(), loaded.level, loaded.parallel,
    )  # fmt: skip
    if loaded.library.mpq_attend(call):
        raise MemoryError("out of memory for the CPU kernel's scratch buffers")
    return out.to(query.dtype)


def rounds(vectors: abi.Vectors | None) -> bool:
    """Whether the library rounds tokens to this format."""
    if vectors is None:
        return False
    if not vectors.scale_bytes or vectors.scale_kind == ELEMENTS["fp16"]:
        return not vectors.weight or vectors.weight.contents.kind == panels.INTEGER
    return bool(vectors.weight and vectors.weight.contents.kind == panels.INTEGER) and (
        vectors.scale_kind == cpu.SCALE_KINDS.index("e4m3")
    )


def append(vectors: Tensor, slabs: Sequence[Tensor], format: str, values: bool, positions: Sequence[int]) -> None:
    """torch.ops.mpq.append on a CPU."""
    count, heads, tokens, width = vectors.shape
    loaded, described = cpu.native(), vectors_of(format, width, slabs[0].dtype)
    fits = all(slab.stride()[1:] == (slab.shape[2], 1) for slab in slabs) and width <= MAX_WIDTH
    if loaded is None or described is None or not rounds(described) or not fits:
        return attention.append_plainly(vectors, slabs, format, values, positions)
    x = vectors.float()
    x = x if x.stride(3) == 1 else x.contiguous()
    held, shared, threads = slabs_of(slabs), ctypes.pointer(described), torch.get_num_threads()
    start, size = ctypes.addressof(held), len(slabs) // count * ctypes.sizeof(abi.Slab)
    calls = (abi.Append * count)(*(
        abi.Append(
            shared, ctypes.cast(start + index * size, ctypes.POINTER(abi.Slab)), x.data_ptr() + index * x.stride(0) * 4,
            x.stride(1), x.stride(2), heads, tokens, position, values, threads, loaded.parallel,
        )
        for index, position in enumerate(positions)
    ))  # fmt: skip
    loaded.library.mpq_append_tokens(calls, count)
    return None


attention.KERNELS["cpu"] = attend
attention.APPENDS["cpu"] = append
