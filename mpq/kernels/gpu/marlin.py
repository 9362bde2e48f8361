"""MARLIN's own packing of 4-bit weights, bit for bit (arXiv 2408.11743; IST-DASLab's `Layer.pack`).

A weight (rows, cols), transposed there to (cols, rows), is cut into 16x16 tiles; four neighbouring tiles of rows are
shuffled so that each lane of a warp finds the right operand of four `mma.m16n8k16` pairs in one 16-byte load; eight
codes share an int32, interleaved for `lop3`. Codes are unsigned with zero at 8, as our int4's.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.errors import MpqError

_INTERLEAVE = [0, 2, 4, 6, 1, 3, 5, 7]
_SCALE_ORDER = [i + 8 * j for i in range(8) for j in range(8)]
_ROW_SCALE_ORDER = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


@lru_cache(maxsize=1)
def _order() -> Tensor:
    """The source position of each of 1,024 consecutive codes (four tiles)."""
    order = []
    for lane in range(32):
        col, q = divmod(lane, 4)
        rows = (2 * q, 2 * q + 1, 2 * (q + 4), 2 * (q + 4) + 1)
        one = [16 * row + col + 8 * block for block in (0, 1) for row in rows]
        order += [place + 256 * tile for tile in range(4) for place in one]
    return torch.tensor(order).reshape(-1, 8)[:, _INTERLEAVE].reshape(-1)


def pack(codes: Tensor) -> Tensor:  # uint8 (rows, cols), below 16
    """int32 (cols / 16, 2 rows).

    Raises:
        MpqError: rows are not a multiple of 64 or cols not of 16 (the kernel itself needs 256 and 128).
    """
    rows, cols = codes.shape
    if rows % 64 or cols % 16:
        raise MpqError(f"MARLIN packs rows by 64 and columns by 16, not a matrix of {rows} x {cols}")
    tiles = codes.T.reshape(cols // 16, 16, rows // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    shuffled = tiles[:, _order().to(codes.device)].reshape(cols // 16, -1, 8).long()
    words = (shuffled << 4 * torch.arange(8, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor) -> Tensor:  # int32 (cols / 16, 2 rows)
    """The inverse of `pack`: uint8 (rows, cols)."""
    blocks, rows = words.shape[0], words.shape[1] // 2
    shuffled = (words.long().unsqueeze(-1) >> 4 * torch.arange(8, device=words.device)) & 15
    tiles = torch.empty(blocks * rows // 64, 1024, dtype=torch.uint8, device=words.device)
    tiles[:, _order().to(words.device)] = shuffled.reshape(-1, 1024).to(torch.uint8)
    return tiles.reshape(blocks, rows // 16, 16, 16).permute(0, 2, 1, 3).reshape(blocks * 16, rows).T.contiguous()


def pack_scales(scales: Tensor) -> Tensor:  # (rows, groups)
    """(groups, rows) in the order of the kernel's accumulators; one group for a row has an order of its own."""
    order = torch.tensor(_SCALE_ORDER if scales.shape[1] > 1 else _ROW_SCALE_ORDER, device=scales.device)
    by_group = scales.T
    return by_group.reshape(-1, len(order))[:, order].reshape(by_group.shape).contiguous()


def unpack_scales(packed: Tensor) -> Tensor:  # (groups, rows)
    """The inverse of `pack_scales`: (rows, groups)."""
    order = torch.tensor(_SCALE_ORDER if packed.shape[0] > 1 else _ROW_SCALE_ORDER, device=packed.device)
    return packed.reshape(-1, len(order))[:, order.argsort()].reshape(packed.shape).T.contiguous()
