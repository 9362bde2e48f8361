"""Bit layouts of quantized matrices: one canonical layout on disk, others arranged losslessly after loading.

The canonical layout is called "rows". Each row's codes are a little-endian bit stream (the first code in the lowest
bits) padded to whole bytes; so are each row's zero points, integer scales and integer minima. Other scales are
stored in their own type.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.errors import MpqError, nearest_names
from mpq.core.formats import Format
from mpq.core.grids import INTEGER_SCALES
from mpq.core.mix import Mix
from mpq.rounding.codes import COPY_DTYPES, SCALE_DTYPES, decode_scales, encode_scales
from mpq.rounding.reference import Quantized, no_codes

ROWS = "rows"
ASSIGNMENT = "assignment"  # tensor of a mix


@dataclass(frozen=True)
class Packed:
    """A quantized matrix as bytes.

    In the canonical layout `tensors` holds, where the format has them and in this order:
    packed uint8 (rows, ceil(cols * bits / 8)), a float copy as it is (rows, cols); scale, in its stored type,
    (rows, groups) or (1, 1), or a bit stream of integers; zeros uint8 (rows or 1, ceil(groups * bits / 8)); minimum, as
    scale; super_scale and super_minimum float16 (rows, super-blocks); tensor_scale float32 (). Of a mix it holds these
    for the rows of each of its formats that has any, named by the format's place ("0.packed"), and `assignment` uint8
    (bytes,), a bit stream of the places by row.
    """

    format: Format
    shape: tuple[int, int]
    layout: str = ROWS
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack_bits(codes: Tensor, bits: int) -> Tensor:  # codes: uint8 (rows, cols), each below 2**bits
    """Each row as a bit stream: uint8 (rows, ceil(cols * bits / 8)).

    >>> pack_bits(torch.tensor([[1, 2, 7]], dtype=torch.uint8), 3).tolist()
    [[209, 1]]
    """
    rows, cols = codes.shape
    block = _block(bits)
    padded = torch.nn.functional.pad(codes, (0, -cols % block.codes)).reshape(rows, -1, block.codes)
    words = padded[..., 0].to(block.word)
    for index in range(1, block.codes):
        words |= padded[..., index].to(block.word) << (bits * index)
    stream = torch.stack([(words >> (8 * index) & 0xFF).to(torch.uint8) for index in range(block.bytes)], -1)
    return stream.flatten(1)[:, : -(-cols * bits // 8)].contiguous()


def unpack_bits(stream: Tensor, bits: int, cols: int) -> Tensor:  # stream: uint8 (rows, ceil(cols * bits / 8))
    """The inverse of `pack_bits`: uint8 (rows, cols)."""
    rows, length = stream.shape
    block = _block(bits)
    blocks = torch.nn.functional.pad(stream, (0, -length % block.bytes)).reshape(rows, -1, block.bytes)
    words = blocks[..., 0].to(block.word)
    for index in range(1, block.bytes):
        words |= blocks[..., index].to(block.word) << (8 * index)
    mask = 2**bits - 1
    codes = torch.stack([(words >> (bits * index) & mask).to(torch.uint8) for index in range(block.codes)], -1)
    return codes.flatten(1)[:, :cols].contiguous()


@dataclass(frozen=True)
class Block:
    """The fewest codes that fill whole bytes, and the smallest word that holds them."""

    codes: int
    bytes: int
    word: torch.dtype


@lru_cache(maxsize=8)
def _block(bits: int) -> Block:
    """The block of codes of 1 to 8 bits.

    >>> _block(6)
    Block(codes=4, bytes=3, word=torch.int32)
    """
    codes, size = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    return Block(codes, size, torch.uint8 if size == 1 else torch.int32 if size <= 3 else torch.int64)


def pack(quantized: Quantized) -> Packed:
    """The matrix in the canonical layout; of a mix that of each part, and the assignment of its rows."""
    format = quantized.format
    if isinstance(format, Mix):
        return of_parts(format, quantized.shape, [pack(part) for part in quantized.parts])
    if format.is_float_copy:
        return Packed(format, quantized.shape, tensors={"packed": quantized.codes.contiguous()})
    assert quantized.scales is not None
    tensors = {
        "packed": pack_bits(quantized.codes, format.grid.bits),
        "scale": _stored(quantized.scales, format.scale),
    }
    if quantized.zeros is not None:
        tensors["zeros"] = pack_bits(quantized.zeros, format.grid.bits)
    if quantized.minima is not None:
        tensors["minimum"] = _stored(quantized.minima, format.minimum)
    if quantized.super_scales is not None:
        tensors["super_scale"] = quantized.super_scales.half()
    if quantized.super_minima is not None:
        tensors["super_minimum"] = quantized.super_minima.half()
    if quantized.tensor_scale is not None:
        tensors["tensor_scale"] = quantized.tensor_scale
    return Packed(format, quantized.shape, tensors=tensors)


def unpack(packed: Packed) -> Quantized:
    """The inverse of `pack`, from any layout."""
    packed = to_layout(packed, ROWS)
    format, (rows, cols), tensors = packed.format, packed.shape, packed.tensors
    if isinstance(format, Mix):
        parts = tuple(map(unpack, parts_of(packed)))
        return Quantized(format, packed.shape, no_codes(parts[0].codes), parts=parts)
    if format.is_float_copy:
        return Quantized(format, packed.shape, tensors["packed"])
    bits, groups = format.grid.bits, format.groups(cols)
    zeros = tensors.get("zeros")
    return Quantized(
        format,
        (rows, cols),
        unpack_bits(tensors["packed"], bits, cols),
        _read(tensors["scale"], format.scale, groups),
        None if zeros is None else unpack_bits(zeros, bits, groups),
        tensors.get("tensor_scale"),
        _read(tensors["minimum"], format.minimum, groups) if format.minimum else None,
        tensors["super_scale"].float() if format.super_group else None,
        tensors["super_minimum"].float() if "super_minimum" in tensors else None,
    )


def _stored(table: Tensor, kind: str) -> Tensor:
    """Scales or minima as bytes: integers as bit streams, others in their own type."""
    stored = encode_scales(table, kind).contiguous()
    return pack_bits(stored, INTEGER_SCALES[kind].bits) if kind in INTEGER_SCALES else stored


def _read(stored: Tensor, kind: str, groups: int) -> Tensor:
    """The inverse of `_stored`, float32 (rows, groups)."""
    if kind in INTEGER_SCALES:
        stored = unpack_bits(stored, INTEGER_SCALES[kind].bits, groups)
    return decode_scales(stored, kind)


def tensor_specs(format: Format, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor of the canonical layout, in its fixed order; a mix must have its assignment."""
    if isinstance(format, Mix):
        parts = {
            f"{place}.{name}": spec
            for place, (part, count) in enumerate(zip(format.formats, format.counts(rows, cols), strict=True))
            if count
            for name, spec in tensor_specs(part, count, cols).items()
        }
        return {**parts, ASSIGNMENT: ((format.assignment_bytes(rows),), torch.uint8)}
    if format.is_float_copy:
        return {"packed": ((rows, cols), COPY_DTYPES[format.grid.name])}
    bits, groups = format.grid.bits, format.groups(cols)
    scale_rows = 1 if format.granularity == "tensor" else rows
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((rows, -(-cols * bits // 8)), torch.uint8),
        "scale": ((scale_rows, _width(groups, format.scale)), SCALE_DTYPES[format.scale]),
    }
    if format.zero_point:
        specs["zeros"] = ((scale_rows, -(-groups * bits // 8)), torch.uint8)
    if format.minimum:
        specs["minimum"] = ((scale_rows, _width(groups, format.minimum)), SCALE_DTYPES[format.minimum])
    if format.super_group:
        specs["super_scale"] = ((rows, format.super_groups(cols)), torch.float16)
        if format.minimum:
            specs["super_minimum"] = specs["super_scale"]
    if format.tensor_scale:
        specs["tensor_scale"] = ((), torch.float32)
    return specs


def empty(format: Format, rows: int, cols: int, device: str | torch.device | None = None) -> Packed:
    """A matrix whose tensors have shapes and types, and zeros for content."""
    specs = tensor_specs(format, rows, cols)
    tensors = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in specs.items()}
    return Packed(format, (rows, cols), ROWS, tensors)


def _width(groups: int, kind: str) -> int:
    """Number of entries of a row's stored scales or minima."""
    return -(-groups * INTEGER_SCALES[kind].bits // 8) if kind in INTEGER_SCALES else groups


def of_parts(mix: Mix, shape: tuple[int, int], parts: Sequence[Packed]) -> Packed:
    """A mix of matrices, each of the rows of one of its formats, canonical; the mix has its assignment."""
    named = [(mix.formats.index(part.format), to_layout(part, ROWS).tensors) for part in parts]
    tensors = {f"{place}.{name}": tensor for place, own in named for name, tensor in own.items()}
    places = torch.from_numpy(mix.assigned(*shape)).unsqueeze(0)
    tensors[ASSIGNMENT] = pack_bits(places, mix.assignment_bits)[0].to(next(iter(tensors.values())).device)
    return Packed(mix, shape, tensors=tensors)


def parts_of(packed: Packed) -> list[Packed]:
    """The matrices of a mix, one for each format that has rows."""
    assert isinstance(packed.format, Mix)
    parts = []
    for place, format in enumerate(packed.format.formats):
        own = {name.partition(".")[2]: one for name, one in packed.tensors.items() if name.startswith(f"{place}.")}
        if own:
            parts.append(Packed(format, (len(own["packed"]), packed.shape[1]), tensors=own))
    return parts


def read_assignment(mix: Mix, stored: Tensor, rows: int) -> Mix:
    """The mix with the assignment of its rows as it is stored, uint8 (bytes,)."""
    return mix.with_assignment(unpack_bits(stored.cpu().unsqueeze(0), mix.assignment_bits, rows)[0].numpy())


def take_rows(packed: Packed, rows: Tensor) -> Packed:  # rows: int64 (n,)
    """The chosen rows in the canonical layout; from the canonical layout nothing is unpacked."""
    packed = to_layout(packed, ROWS)
    whole = {"tensor_scale"} | ({"scale", "zeros", "minimum"} if packed.format.granularity == "tensor" else set())
    tensors = {name: tensor if name in whole else tensor[rows] for name, tensor in packed.tensors.items()}
    return replace(packed, shape=(len(rows), packed.shape[1]), tensors=tensors)


@dataclass(frozen=True)
class Layout:
    """A lossless arrangement of a packed matrix.

    `arrange` takes the canonical layout, `restore` gives it back; `names` are those of its tensors for a format, in
    their fixed order. `suits` says whether to use the layout for a matrix on a device; the layouts registered
    last are tried first, and "rows" is the fallback.
    """

    arrange: Callable[[Packed], Packed]
    restore: Callable[[Packed], Packed]
    names: Callable[[Format], Sequence[str]]
    suits: Callable[[Packed, torch.device], bool] = lambda packed, device: False


LAYOUTS: dict[str, Layout] = {
    ROWS: Layout(lambda packed: packed, lambda packed: packed, lambda format: tuple(tensor_specs(format, 1, 1)))
}


def packed_of(weight: Sequence[Tensor], format: Format, shape: tuple[int, int], layout: str) -> Packed:
    """The tensors of a layout, in their fixed order, as a Packed."""
    return Packed(format, shape, layout, dict(zip(LAYOUTS[layout].names(format), weight, strict=True)))


def to_layout(packed: Packed, name: str) -> Packed:
    """The same matrix in the layout called `name`; MpqError when there is none."""
    for needed in (name, packed.layout):
        if needed not in LAYOUTS:
            raise MpqError(f"unknown layout {needed!r}: {nearest_names(needed, LAYOUTS)}")
    if packed.layout == name:
        return packed
    return LAYOUTS[name].arrange(LAYOUTS[packed.layout].restore(packed))


def best_layout(packed: Packed, device: torch.device) -> str:
    """The name of the layout to compute in on a device."""
    return next((name for name in reversed(LAYOUTS) if LAYOUTS[name].suits(packed, device)), ROWS)
