"""The layout "fragments": codes in the register order of the tensor cores' 16-bit matrix instructions.

A weight is cut into tiles of 16 rows by 16 columns, the left operand of `mma.m16n8k16` and of `wgmma.m64k16` (PTX ISA,
"Matrix fragments for mma.m16n8k16"): lane 4 g + q of a warp holds rows g and g + 8, columns 2 q, 2 q + 1, 2 q + 8 and
2 q + 9. Its eight codes lie together in one container, code j at bits [f j, f (j + 1)) of f-bit fields, with
j = 4 (low bit of the column) + 2 (column >= 8) + (row >= 8): the two halves of every register pair are then 4 f bits
apart, and one shift and one `lop3` give both. A code is cut into fields of 4, 2 and 1 bits, high bits first (int6 is
4 + 2); 8-bit codes are bytes. Lanes hold four neighbouring tiles side by side (16 bytes of 4-bit codes), and blocks of
16 rows by 64 columns follow each other along the columns, so that a warp's loads are contiguous. This is offline
packing to the hardware's fragments as in TurboMind (arXiv 2508.15601, section on hardware-aware weight packing).
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.kernels.layout import ROWS, Packed, pack_bits, unpack_bits
from mpq.rounding.codes import decode_scales
from mpq.rounding.reference import Quantized

FRAGMENTS = "fragments"
TILE_ROWS, BLOCK_COLS = 16, 64
CONTAINERS = {8: torch.uint8, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # eight fields; 8-bit codes one by one
# (row tiles, row >= 8, lane's g, column blocks, tiles, column >= 8, lane's q, column's low bit)
_SPLIT = (2, 8, -1, 4, 2, 4, 2)
_TO_LANES = (0, 3, 2, 6, 4, 7, 5, 1)
_TO_ROWS = (0, 7, 2, 1, 4, 6, 3, 5)


def fields(bits: int) -> tuple[int, ...]:
    """Field widths that a code of `bits` bits is split into, high bits first.

    >>> [fields(bits) for bits in range(1, 9)]
    [(1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,)]
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def to_lanes(codes: Tensor) -> Tensor:
    """uint8 (rows, cols) as (row tiles, column blocks, 32 lanes, 4 tiles, 8 codes); filled up with code 0."""
    rows, cols = codes.shape
    padded = functional.pad(codes, (0, -cols % BLOCK_COLS, 0, -rows % TILE_ROWS))
    tiles = padded.reshape(padded.shape[0] // TILE_ROWS, *_SPLIT).permute(_TO_LANES)
    return tiles.reshape(*tiles.shape[:2], 32, 4, 8)


def from_lanes(lanes: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `to_lanes`."""
    tiles, blocks = lanes.shape[:2]
    matrix = lanes.reshape(tiles, blocks, 8, 4, 4, 2, 2, 2).permute(_TO_ROWS)
    return matrix.reshape(tiles * TILE_ROWS, blocks * BLOCK_COLS)[:rows, :cols].contiguous()


def pack_fields(lanes: Tensor, bits: int) -> dict[str, Tensor]:
    """Containers of each field: codes4, codes2, codes1 (row tiles, column blocks, 32, 4), or codes8 (..., 4, 8)."""
    packed, rest = {}, bits
    for width in fields(bits):
        rest -= width
        field = (lanes >> rest) & (2**width - 1)
        if width < 8:
            shifts = width * torch.arange(8, device=lanes.device)
            wide = (field.long() << shifts).sum(-1)
            field = _wrap(wide, 8 * width)
        packed[f"codes{width}"] = field.contiguous()
    return packed


def _wrap(wide: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of `bits` bits in the container's own type, which may be signed."""
    dtype = CONTAINERS[bits // 8]
    signed = torch.iinfo(dtype).min < 0
    return (torch.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide) if signed else wide).to(dtype)


def unpack_fields(packed: dict[str, Tensor], bits: int) -> Tensor:
    """The inverse of `pack_fields`: uint8 (row tiles, column blocks, 32, 4, 8)."""
    codes: Tensor | None = None
    for width in fields(bits):
        field = packed[f"codes{width}"].long()
        if width < 8:
            shifts = width * torch.arange(8, device=field.device)
            field = (field.unsqueeze(-1) >> shifts) & (2**width - 1)
        codes = field if codes is None else (codes << width) | field
    assert codes is not None
    return codes.to(torch.uint8)


def arrange(packed: Packed) -> Packed:
    """From the canonical layout.

    Tensors: the codes' fields; scale (groups, rows filled up to 16) in its stored type and zeros uint8 likewise, one
    scale for the tensor repeated for every row; tensor_scale ().

    Raises:
        MpqError: a float copy has no codes to arrange.
    """
    format, (rows, cols) = packed.format, packed.shape
    if format.is_float_copy:
        raise MpqError(f"{format.name} is a plain float copy: keep it in the layout 'rows'")
    tensors = pack_fields(to_lanes(unpack_bits(packed.tensors["packed"], format.grid.bits, cols)), format.grid.bits)
    tensors["scale"] = _by_group(packed.tensors["scale"], rows)
    if "zeros" in packed.tensors:
        zeros = unpack_bits(packed.tensors["zeros"], format.grid.bits, format.groups(cols))
        tensors["zeros"] = _by_group(zeros, rows)
    if "tensor_scale" in packed.tensors:
        tensors["tensor_scale"] = packed.tensors["tensor_scale"]
    return replace(packed, layout=FRAGMENTS, tensors=tensors)


def _by_group(values: Tensor, rows: int) -> Tensor:
    by_row = values.expand(rows, -1) if values.shape[0] == 1 else values
    return functional.pad(by_row.T, (0, -rows % TILE_ROWS)).contiguous()


def restore(packed: Packed) -> Packed:
    """Back to the canonical layout, bit for bit."""
    format, (rows, cols), arranged = packed.format, packed.shape, dict(packed.tensors)
    bits, scale_rows = format.grid.bits, 1 if format.granularity == "tensor" else rows
    codes = from_lanes(unpack_fields(arranged, bits), rows, cols)
    tensors = {"packed": pack_bits(codes, bits), "scale": arranged["scale"][:, :scale_rows].T.contiguous()}
    if "zeros" in arranged:
        tensors["zeros"] = pack_bits(arranged["zeros"][:, :scale_rows].T.contiguous(), bits)
    if "tensor_scale" in arranged:
        tensors["tensor_scale"] = arranged["tensor_scale"]
    return replace(packed, layout=ROWS, tensors=tensors)


def take_rows(packed: Packed, rows: Tensor) -> Quantized:  # rows: int64 (n,)
    """The chosen rows; only the 16-row tiles that hold them are unpacked."""
    format, arranged, chosen = packed.format, packed.tensors, rows.shape[0]
    tiles = {name: arranged[name][rows // TILE_ROWS] for name in names(format) if name.startswith("codes")}
    lanes = unpack_fields(tiles, format.grid.bits)
    rows_of_tiles = from_lanes(lanes, chosen * TILE_ROWS, packed.shape[1])
    codes = rows_of_tiles[torch.arange(chosen, device=rows.device) * TILE_ROWS + rows % TILE_ROWS]
    picked = rows[:0].new_zeros(1) if format.granularity == "tensor" else rows
    scales = decode_scales(arranged["scale"][:, picked].T, format.scale)
    zeros = arranged["zeros"][:, picked].T if "zeros" in arranged else None
    return Quantized(format, (chosen, packed.shape[1]), codes, scales, zeros, arranged.get("tensor_scale"))


def names(format: Format) -> tuple[str, ...]:
    """Names of the layout's tensors in their fixed order."""
    codes = tuple(f"codes{width}" for width in fields(format.grid.bits))
    return (*codes, "scale", *("zeros",) * format.zero_point, *("tensor_scale",) * format.tensor_scale)


def covers(format: Format) -> bool:
    """Whether the GPU kernels support the format: groups of a multiple of 16, rows, or the whole tensor."""
    return not format.is_float_copy and format.is_plain and format.grid.bits <= 8 and format.group_size % TILE_ROWS == 0
