"""The "panels" layout of the CPU kernels: each thread streams a panel of 64 rows from front to back.

src/abi.h specifies the bytes, docs/kernels.md draws them. A panel is a row of tiles; a tile is its scales and zero
points, 64 for each segment (columns that share a scale), then its codes in steps of 64 (4 columns of 16 rows), in
the order of use. Scales of rows, or of the tensor, are stored once at the panel's end.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from mpq.core.formats import Format
from mpq.core.grids import SCALES, Grid
from mpq.kernels.cpu.pages import empty_on_large_pages
from mpq.kernels.layout import Packed, pack_bits, unpack_bits
from mpq.rounding.codes import SCALE_DTYPES

NAME = "panels"
ROWS = 64
END = 64  # padding bytes at a panel's end, since codes are loaded as whole vectors
TILE = 128  # columns of a tile, where groups allow
MAX_TILE = 256
LARGEST = 127 * 257  # largest level of two signed bytes
CODES_AT_A_TIME = 2**20  # codes arranged at a time, so that temporaries stay in the cache
INTEGER, TABLE8, TABLE16, TABLE_BF16 = range(4)


@dataclass(frozen=True)
class Levels:
    """The integers or bf16 that kernels multiply, for each code: value = factor * (level - offset).

    A level is the code itself (INTEGER), a byte from a table (TABLE8), 256 * (high - 128) + low from two tables
    (TABLE16), or a bf16 whose bytes come from two tables (TABLE_BF16, offset 0).
    """

    kind: int
    offset: int = 0
    factor: float = 1.0
    low: bytes = b""
    high: bytes = b""


@dataclass(frozen=True)
class Cut:
    """Partition of a (rows, cols) matrix; sizes in columns unless stated otherwise."""

    group: int  # columns that share a scale
    segment: int  # the same, padded to a multiple of 4
    segments: int  # segments in a tile
    tiles: int  # tiles in a panel
    panels: int
    row_scales: bool  # scales stand at the panel's end
    repeats: int  # segments for each of the format's scales

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.segment * self.segments


def supports(format: Format) -> bool:
    """Whether the layout supports a format."""
    if format.is_float_copy or not format.is_plain or format.grid.bits > 8 or format.grid.family == "exponent":
        return False
    if format.granularity == "group" and format.group_size > MAX_TILE and format.group_size % TILE:
        return False
    return levels_of(format.grid) is not None


def cut_of(format: Format, rows: int, cols: int) -> Cut:
    """The partition of a matrix in a format."""
    panels = -(-rows // ROWS)
    if format.granularity != "group":
        width = TILE if cols > TILE // 2 else TILE // 2
        return Cut(width, width, 1, -(-cols // width), panels, True, 1)
    group, repeats = format.group_size, 1
    if group > MAX_TILE:
        group, repeats = TILE, group // TILE
    segment = -(-group // 4) * 4
    segments = max(1, TILE // segment)
    groups = -(-cols // group)
    return Cut(group, segment, segments, -(-groups // segments), panels, False, repeats)


@lru_cache(maxsize=64)
def levels_of(grid: Grid) -> Levels | None:
    """The levels of a grid, exact but for codebooks of fractions (steps of 1/32639 of their largest value); or None."""
    if grid.family == "int":
        return Levels(INTEGER, grid.offset)
    values = grid.values()
    if grid.bits <= 6 and np.isfinite(values).all():
        if grid.family != "codebook":
            unit = grid.smallest
        elif (values == np.rint(values)).all():
            unit = 1.0
        else:
            unit = float(np.abs(values).max()) / LARGEST
        whole = np.rint(values / unit).astype(np.int64)
        if whole.min() >= -128 and whole.max() <= 127:
            return Levels(TABLE8, -int(whole.min()), unit, _table(whole - whole.min()))
        while np.abs(whole).max() < 16384:  # use all bits: offsets then cancel without loss
            whole, unit = 2 * whole, unit / 2
        if np.abs(whole).max() <= LARGEST:
            return Levels(TABLE16, 0, unit, _table(whole & 255), _table((whole >> 8) + 128))
    halves = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    if not np.array_equal(halves.double().numpy(), values, equal_nan=True) or grid.family != "float":
        return None
    words = halves.view(torch.int16).numpy().astype(np.int64)
    return Levels(TABLE_BF16, 0, 1.0, _table(words & 255), _table(words >> 8 & 255))


@dataclass(frozen=True)
class BitMap:
    """Bit matrices that map an 8-bit float's code to a bf16, for codes with any bit of `normal_mask`.

    Each byte of the bf16 is a matrix over GF(2) times the code's bits: 64 bits whose byte 7 - i makes bit i, in the
    layout of GF2P8AFFINEQB. The high byte is then xored with `high_flip`: copies of its top bit add the bias.
    """

    low_matrix: int = 0
    high_matrix: int = 0
    high_flip: int = 0
    normal_mask: int = 0  # 0: no such map exists


@lru_cache(maxsize=64)
def bit_map_of(grid: Grid) -> BitMap:
    """The map of a TABLE_BF16 grid: found by flipping single bits, checked on every finite normal code."""
    levels = levels_of(grid)
    if levels is None or levels.kind != TABLE_BF16 or grid.bits != 8:
        return BitMap()
    codes, finite = np.arange(256), np.isfinite(grid.values())
    halves = [np.frombuffer(half, np.uint8) for half in (levels.low, levels.high)]
    for normal in (0x7F & -(1 << mantissa) for mantissa in range(1, 7)):
        ordinary = finite & (codes & normal != 0)
        for start in codes[ordinary]:
            if not ordinary[start ^ (1 << np.arange(8))].all():
                continue
            matrices, extras = [], []
            for half in halves:
                columns = [int(half[start] ^ half[start ^ (1 << bit)]) for bit in range(8)]
                rows = [sum((column >> i & 1) << bit for bit, column in enumerate(columns)) for i in range(8)]
                moved = np.bitwise_xor.reduce([np.where(codes >> bit & 1, columns[bit], 0) for bit in range(8)])
                extra = int(half[start] ^ moved[start])
                if (((moved ^ extra) != half) & ordinary).any():
                    break
                matrices.append(sum(row << 8 * (7 - i) for i, row in enumerate(rows)))
                extras.append(extra)
            if len(extras) == 2 and not extras[0]:
                return BitMap(matrices[0], matrices[1], extras[1], normal)
    return BitMap()


@lru_cache(maxsize=1024)
def bf16_terms(format: Format) -> int:
    """Number of bf16 terms whose sum is a weight with its group's scale: 1 is exact, 2 has a relative error of 2**-17.

    A product has as many significant bits as its factors together; bf16 has 8. Row scales are applied later.
    """
    levels = levels_of(format.grid)
    assert levels is not None
    whole = format.grid.values() / levels.factor
    if format.zero_point:  # a code minus its zero point
        whole = np.arange(2.0**format.grid.bits)
    level_bits = max(_significant(float(value)) for value in whole if np.isfinite(value))
    scale_bits = 1
    if format.granularity == "group":
        scale_bits = {"e8m0": 1, "e4m3": 4, "ue5m3": 4, "bf16": 8, "fp16": 11, "fp32": 24}[format.scale]
    powers = min(level_bits, scale_bits) <= 1  # powers of two: they shift the other factor only
    return 1 if max(level_bits, scale_bits) + (0 if powers else min(level_bits, scale_bits)) <= 8 else 2


def _significant(value: float) -> int:
    """Bits from the first to the last set bit.

    >>> _significant(12.0), _significant(0.0), _significant(-0.75)
    (2, 0, 2)
    """
    numerator = abs(value).as_integer_ratio()[0]
    return numerator.bit_length() - (numerator & -numerator).bit_length() + 1 if numerator else 0


def _table(entries: NDArray[np.int64]) -> bytes:
    """256 bytes: the entries, repeated."""
    return bytes(np.resize(entries, 256).astype(np.uint8))


def arrange(packed: Packed) -> Packed:
    """The canonical layout as panels."""
    format, (rows, cols), tensors = packed.format, packed.shape, packed.tensors
    cut = cut_of(format, rows, cols)
    scales, zeros = tensors["scale"].expand(rows, -1), None
    if format.zero_point:
        zeros = unpack_bits(tensors["zeros"], format.grid.bits, scales.shape[1]).expand(rows, -1)
    step = max(1, CODES_AT_A_TIME // (ROWS * cut.tile * cut.tiles)) * ROWS
    parts = [tensors["packed"], scales, *(() if zeros is None else (zeros,))]
    pieces = [_panels([part[start : start + step] for part in parts], format, cols) for start in range(0, rows, step)]
    placed = empty_on_large_pages((cut.panels, pieces[0].shape[1]), torch.uint8)
    arranged = {"panels": torch.cat(pieces, out=placed)}
    if format.tensor_scale:
        arranged["tensor_scale"] = tensors["tensor_scale"]
    return Packed(format, packed.shape, NAME, arranged)


def _panels(rows: list[Tensor], format: Format, cols: int) -> Tensor:
    """Some rows' packed codes, scales and zero points (not packed) as panels, uint8 (panels, bytes)."""
    packed, *others = rows
    cut, bits = cut_of(format, len(packed), cols), format.grid.bits
    codes = _segments(unpack_bits(packed, bits, cols), cut)
    steps = codes.reshape(cut.panels, 4, 16, cut.tiles, cut.tile // 4, 4).permute(0, 3, 4, 1, 2, 5)
    parts = [_steps_to_bytes(steps, format).reshape(cut.panels, cut.tiles, -1)]
    for part in others:
        parts.append(
            _by_segment(part, cut).view(torch.uint8).reshape(cut.panels, 1 if cut.row_scales else cut.tiles, -1)
        )
    if cut.row_scales:
        return torch.cat([part.flatten(1) for part in parts], 1)
    whole = torch.cat([*parts[1:], parts[0]], 2).flatten(1)
    return pad(whole, (0, END))


def restore(packed: Packed) -> Packed:
    """Panels as the canonical layout."""
    format, (rows, cols) = packed.format, packed.shape
    cut, bits = cut_of(format, rows, cols), format.grid.bits
    panels = packed.tensors["panels"]
    sizes = [cut.tile * 8 * bits, cut.segments * ROWS * SCALE_DTYPES[format.scale].itemsize]
    if format.zero_point:
        sizes.append(cut.segments * ROWS)
    if cut.row_scales:
        parts = list(torch.split(panels, [sizes[0] * cut.tiles, *sizes[1:]], 1))
    else:
        tiles = panels[:, :-END].reshape(cut.panels, cut.tiles, -1)
        *others, codes = torch.split(tiles, [*sizes[1:], sizes[0]], 2)
        parts = [codes, *others]
    steps = _bytes_to_steps(parts[0].reshape(cut.panels, cut.tiles, cut.tile // 4, -1), format)
    codes = steps.permute(0, 3, 4, 1, 2, 5).reshape(cut.panels * ROWS, cut.tiles * cut.segments, cut.segment)
    codes = codes[:rows, :, : cut.group].flatten(1)[:, :cols]
    groups = format.groups(cols)
    scale_rows = 1 if format.granularity == "tensor" else rows
    small = [
        _by_row(part, kind, cut)[:scale_rows, :: cut.repeats][:, :groups].contiguous()
        for part, kind in zip(parts[1:], (SCALE_DTYPES[format.scale], torch.uint8), strict=False)
    ]
    tensors = {"packed": pack_bits(codes.contiguous(), bits), "scale": small[0]}
    if format.zero_point:
        tensors["zeros"] = pack_bits(small[1], bits)
    if format.tensor_scale:
        tensors["tensor_scale"] = packed.tensors["tensor_scale"]
    return Packed(format, packed.shape, tensors=tensors)


def names(format: Format) -> tuple[str, ...]:
    """The layout's tensors in their fixed order."""
    return ("panels", "tensor_scale") if format.tensor_scale else ("panels",)


def is_finite(packed: Packed) -> bool:
    """Whether no scale and no 8-bit float is NaN or infinite; kernels do not handle those."""
    scale, infinite = packed.tensors["scale"], np.flatnonzero(~np.isfinite(packed.format.grid.values()))
    floats = packed.tensors["packed"].view(torch.uint8) if len(infinite) and packed.format.grid.bits == 8 else None
    if floats is not None and bool((floats & 127).max() >= infinite[0]):
        return False
    if scale.is_floating_point():
        return bool(torch.isfinite(scale).all())
    values = torch.tensor(SCALES[packed.format.scale].values())
    return not bool(torch.isnan(values[scale.int()]).any())


def _segments(codes: Tensor, cut: Cut) -> Tensor:  # (rows, cols)
    """(panels * 64, tiles * segments, segment), zero-padded."""
    rows, cols = codes.shape
    groups = cut.tiles * cut.segments
    filled = pad(codes, (0, groups * cut.group - cols, 0, cut.panels * ROWS - rows))
    return pad(filled.reshape(cut.panels * ROWS, groups, cut.group), (0, cut.segment - cut.group))


def _by_segment(part: Tensor, cut: Cut) -> Tensor:  # (rows, groups)
    """(panels, tiles, segments, 64), or (panels, 64) for scales of rows."""
    if cut.row_scales:
        return pad(part.reshape(-1), (0, cut.panels * ROWS - len(part))).reshape(cut.panels, ROWS)
    part = part.repeat_interleave(cut.repeats, 1)[:, : cut.tiles * cut.segments]
    part = pad(part, (0, cut.tiles * cut.segments - part.shape[1], 0, cut.panels * ROWS - len(part)))
    return part.reshape(cut.panels, ROWS, cut.tiles, cut.segments).permute(0, 2, 3, 1).contiguous()


def _by_row(part: Tensor, dtype: torch.dtype, cut: Cut) -> Tensor:
    """The inverse of `_by_segment`, from bytes: (panels * 64, groups)."""
    if cut.row_scales:
        return part.contiguous().view(dtype).reshape(-1, 1)
    part = part.contiguous().view(dtype).reshape(cut.panels, cut.tiles, cut.segments, ROWS)
    return part.permute(0, 3, 1, 2).reshape(cut.panels * ROWS, -1)


def is_bf16(format: Format) -> bool:
    """Whether codes decode to bf16, whose steps pair columns."""
    levels = levels_of(format.grid)
    return levels is not None and levels.kind == TABLE_BF16


def _steps_to_bytes(steps: Tensor, format: Format) -> Tensor:  # (panels, tiles, quads, 4, 16, 4)
    """(panels, tiles, quads, 32 * bits)."""
    shape, bits = steps.shape[:3], format.grid.bits
    if is_bf16(format):  # columns 0 and 1 of four rows, then columns 2 and 3
        steps = steps.reshape(*shape, 4, 4, 4, 2, 2).transpose(-3, -2)
    steps = steps.reshape(*shape, 4, 64)
    if bits == 8:
        return steps.flatten(3)
    if bits == 4:
        return (steps[..., 0::2, :] | steps[..., 1::2, :] << 4).flatten(3)
    if bits == 2:
        return steps[..., 0, :] | steps[..., 1, :] << 2 | steps[..., 2, :] << 4 | steps[..., 3, :] << 6
    return pack_bits(steps.reshape(-1, 64), bits).reshape(*shape, 32 * bits)


def _bytes_to_steps(stream: Tensor, format: Format) -> Tensor:  # (panels, tiles, quads, 32 * bits)
    """The inverse of `_steps_to_bytes`."""
    shape, bits = stream.shape[:3], format.grid.bits
    if bits == 4:
        halves = stream.reshape(*shape, 2, 64)
        steps = torch.stack([halves & 15, halves >> 4], -2)
    elif bits == 2:
        steps = torch.stack([stream >> 2 * index & 3 for index in range(4)], -2)
    else:
        steps = stream if bits == 8 else unpack_bits(stream.reshape(-1, 8 * bits), bits, 64)
    if is_bf16(format):
        steps = steps.reshape(*shape, 4, 4, 2, 4, 2).transpose(-3, -2)
    return steps.reshape(*shape, 4, 16, 4)
