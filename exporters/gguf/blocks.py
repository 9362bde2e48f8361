"""The bytes of ggml's tensor types (gguf 0.19; ggml-common.h): blocks that are a row of parts.

Most parts are planes: a few bits of every code, with codes at a fixed distance sharing a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.exporters.rules import GGUF_TYPES, gguf_block
from mpq.rounding.codes import COPY_DTYPES, encode_scales
from mpq.rounding.reference import Quantized

Bytes = NDArray[Any]  # uint8


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix cut into blocks, in the order (rows, blocks of a row, entries of a block)."""

    codes: Bytes
    scales: Bytes  # codes of integers, else the scales' own bytes
    minima: Bytes
    super_scales: Bytes  # bytes of float16
    super_minima: Bytes


Part = Callable[[Blocks], Bytes]


def plane(fields: Bytes, width: int, run: int) -> Bytes:
    """Fields of `width` bits (..., n) as bytes (..., n * width / 8): byte j of a chunk holds fields j, j + run, ...

    >>> plane(np.array([1, 2, 3, 4], np.uint8), 4, 2).tolist()
    [49, 66]
    """
    chunks = fields.reshape(*fields.shape[:-1], -1, 8 // width, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    joined: Bytes = np.bitwise_or.reduce(chunks << shifts, axis=-2)
    return joined.reshape(*fields.shape[:-1], -1)


def _codes(shift: int, width: int, run: int) -> Part:
    return lambda blocks: plane(blocks.codes >> shift & (2**width - 1), width, run)


def _scales_and_minima(blocks: Blocks) -> Bytes:
    """Eight scales and eight minima of 6 bits: the second four of each lend their top bits to the first four."""
    first, last = (np.split(table, 2, axis=-1) for table in (blocks.scales, blocks.minima))
    tops = [half | (other >> 4) << 6 for half, other in (first, last)]
    return np.concatenate([*tops, first[1] & 15 | (last[1] & 15) << 4], -1)


def _scale(blocks: Blocks) -> Bytes:
    return blocks.scales


def _minimum(blocks: Blocks) -> Bytes:
    return blocks.minima


def _unit(blocks: Blocks) -> Bytes:
    return blocks.super_scales


def _units(blocks: Blocks) -> Bytes:
    return np.concatenate([blocks.super_scales, blocks.super_minima], -1)


PARTS: dict[str, tuple[Part, ...]] = {
    "Q8_0": (_scale, lambda blocks: blocks.codes ^ 0x80),
    "Q4_0": (_scale, _codes(0, 4, 16)),
    "Q5_0": (_scale, _codes(4, 1, 1), _codes(0, 4, 16)),
    "Q4_1": (_scale, _minimum, _codes(0, 4, 16)),
    "Q5_1": (_scale, _minimum, _codes(4, 1, 1), _codes(0, 4, 16)),
    "IQ4_NL": (_scale, _codes(0, 4, 16)),
    "MXFP4": (_scale, _codes(0, 4, 16)),
    "NVFP4": (_scale, _codes(0, 4, 8)),
    "Q2_K": (lambda blocks: blocks.scales | blocks.minima << 4, _codes(0, 2, 32), _units),
    "Q3_K": (
        _codes(2, 1, 32),
        _codes(0, 2, 32),
        lambda blocks: plane(blocks.scales & 15, 4, 8),
        lambda blocks: plane(blocks.scales >> 4, 2, 4),
        _unit,
    ),
    "Q4_K": (_units, _scales_and_minima, _codes(0, 4, 32)),
    "Q5_K": (_units, _scales_and_minima, _codes(4, 1, 32), _codes(0, 4, 32)),
    "Q6_K": (_codes(0, 4, 64), _codes(4, 2, 32), lambda blocks: blocks.scales ^ 0x80, _unit),
}


def type_of(format: Format, gguf: Any) -> tuple[Any, Any]:
    """numpy's type of a format's stored matrix, and ggml's (None if numpy's determines it).

    Raises:
        MpqError: the installed package gguf is too old to know the type.
    """
    if format.is_float_copy:
        content, kind = raw_copy(torch.empty(0, dtype=COPY_DTYPES[format.grid.name]), gguf)
        return content.dtype, kind
    name = GGUF_TYPES[format.name]
    if not hasattr(gguf.GGMLQuantizationType, name):
        raise MpqError(f"the installed package gguf does not know the type {name}: pip install --upgrade gguf")
    return np.dtype(np.uint8), gguf.GGMLQuantizationType[name]


def encode_blocks(quantized: Quantized, gguf: Any) -> NDArray[Any]:
    """The matrix as ggml stores it, uint8 (rows, bytes of a row); a float copy as it is."""
    format = quantized.format
    if format.is_float_copy:
        return raw_copy(quantized.codes, gguf)[0]
    blocks = _cut(quantized, gguf_block(format))
    content: NDArray[Any] = np.concatenate([part(blocks) for part in PARTS[GGUF_TYPES[format.name]]], -1)
    return content.reshape(len(content), -1)


def _cut(quantized: Quantized, size: int) -> Blocks:
    format, (rows, cols) = quantized.format, quantized.shape
    minima, super_minima = quantized.minima, quantized.super_minima
    if super_minima is not None:  # ggml subtracts minima, which we add
        super_minima = -super_minima

    def cut(table: Tensor | None, kind: str) -> Bytes:
        if table is None:
            return np.zeros((rows, cols // size, 0), np.uint8)
        stored = encode_scales(table, kind).contiguous().reshape(rows, -1)
        return stored.view(torch.uint8).numpy().reshape(rows, cols // size, -1)

    return Blocks(
        quantized.codes.numpy().reshape(rows, cols // size, size),
        cut(quantized.scales, format.scale),
        cut(minima, format.minimum),
        cut(quantized.super_scales, "fp16"),
        cut(super_minima, "fp16"),
    )


def raw_copy(tensor: Tensor, gguf: Any) -> tuple[NDArray[Any], Any]:
    """A float tensor unchanged, in its numpy type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
    return tensor.numpy(), None
