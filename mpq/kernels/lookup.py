"""Single rows of a matrix in panels, without unpacking the 63 others of their panels: an embedding's look-up.

native/mpq.h says where codes stand. The bit that a code starts at is the sum of a part that its row decides and one
that its column does, in every width.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.formats import parse_format
from mpq.core.rounding import SCALE_DTYPES, Quantized, decode_scales
from mpq.kernels.layout import Packed
from mpq.kernels.panels import ROWS, cut_of, is_bfloat


@lru_cache(maxsize=64)
def _bits(format_name: str, rows: int, cols: int) -> tuple[Tensor, Tensor, int, int]:
    """First bits of codes: parts of a panel's rows (64,) and of columns (cols,); bytes of a tile and of its codes."""
    format = parse_format(format_name)
    cut, bits = cut_of(format, rows, cols), format.grid.bits
    codes = cut.tile * 8 * bits
    scales = 0 if cut.row_scales else cut.segments * ROWS * (SCALE_DTYPES[format.scale].itemsize + format.zero_point)
    row, col = torch.arange(ROWS), torch.arange(cols)
    place = col // cut.group * cut.segment + col % cut.group  # with segments filled up
    tile, within = place // cut.tile, place % cut.tile
    step, lane, part = row // 16, row % 16, within % 4
    if is_bfloat(format):  # columns 0 and 1 of four rows, then columns 2 and 3
        lane, part = lane // 4 * 16 + lane % 4 * 2, part // 2 * 8 + part % 2
    else:
        lane = lane * 4
    if bits == 4:
        steps, width = step // 2 * 512 + step % 2 * 4, 8
    elif bits == 2:
        steps, width = step * 2, 8
    else:
        steps, width = step * 64 * bits, bits
    by_col = 8 * (tile * (codes + scales) + within // 4 * 32 * bits) + part * width
    return steps + lane * width, by_col, codes + scales, codes


def rows_of(packed: Packed, rows: Tensor) -> Quantized:  # int64 (n,)
    """The chosen rows of a matrix in panels."""
    format, (height, cols) = packed.format, packed.shape
    cut, bits = cut_of(format, height, cols), format.grid.bits
    by_row, by_col, tile_bytes, code_bytes = _bits(format.name, height, cols)
    panels = packed.tensors["panels"]
    stream, panel_bytes = panels.flatten(), panels.shape[1]
    start, row = (rows // ROWS * panel_bytes).unsqueeze(1), rows % ROWS  # (n, 1), (n,)
    bit = by_row[row].unsqueeze(1) + by_col
    byte, shift = start + (bit >> 3), bit & 7
    codes = stream[byte].int()
    if 8 % bits:  # a code may reach into the next byte
        codes |= stream[(byte + 1).clamp(max=len(stream) - 1)].int() << 8
    codes = (codes >> shift & 2**bits - 1).to(torch.uint8)

    group = torch.arange(format.groups(cols) if format.granularity == "group" else 1) * cut.repeats
    if cut.row_scales:
        base, row_step = torch.tensor([cut.tiles * code_bytes]), ROWS
    else:
        base, row_step = group // cut.segments * tile_bytes + code_bytes, ROWS * cut.segments
        row = row.unsqueeze(1) + group % cut.segments * ROWS
    base = start + base
    row = row.reshape(len(rows), -1)
    size = SCALE_DTYPES[format.scale].itemsize
    scale = stream[(base + row * size).unsqueeze(-1) + torch.arange(size)].view(SCALE_DTYPES[format.scale]).squeeze(-1)
    zeros = stream[base + row_step * size + row] if format.zero_point else None
    if format.granularity == "tensor":
        scale, zeros = scale[:1], None if zeros is None else zeros[:1]
    return Quantized(
        format, (len(rows), cols), codes, decode_scales(scale, format.scale), zeros, packed.tensors.get("tensor_scale")
    )
