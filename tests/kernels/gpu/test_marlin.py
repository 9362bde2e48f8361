"""MARLIN's packing against the right fragment of mma.m16n8k16 and its dequantization by lop3."""

import numpy as np
import pytest
import torch

from mpq.core.errors import MpqError
from mpq.kernels.gpu import marlin


def test_packing_is_invertible() -> None:
    codes = torch.randint(16, (192, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = marlin.pack(codes)
    assert words.shape == (10, 384)
    assert torch.equal(marlin.unpack(words), codes)
    for groups in (1, 5):
        scales = torch.randn(192, groups)
        assert torch.equal(marlin.unpack_scales(marlin.pack_scales(scales)), scales)


def dequantize(word: int) -> list[float]:
    """Apply MARLIN's `dequant` twice: lop3, then subtract 1032 or multiply by 1/16 and add -72."""
    numbers = []
    for _ in range(2):
        low = np.array([(word & 0x000F000F) | 0x64006400], np.uint32).view(np.float16)
        high = np.array([(word & 0x00F000F0) | 0x64006400], np.uint32).view(np.float16)
        less = np.array([0x64086408], np.uint32).view(np.float16)
        factor, addend = (np.array([bits], np.uint16).view(np.float16) for bits in (0x2C00, 0xD480))
        assert (float(less[0]), float(factor[0]), float(addend[0])) == (1032.0, 0.0625, -72.0)
        numbers += (low - less).tolist() + (high * factor + addend).tolist()
        word >>= 8
    return numbers


def test_each_lane_finds_its_fragments_in_register_order() -> None:
    codes = torch.randint(16, (128, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = marlin.pack(codes).numpy().view(np.uint32)
    matrix = codes.int() - 8  # (rows, cols): the kernel's B is its transpose
    for k_tile in range(3):
        for block in range(2):  # 64 rows
            for lane in range(32):
                g, q = divmod(lane, 4)
                for tile in range(4):
                    numbers = dequantize(int(words[k_tile, (block * 32 + lane) * 4 + tile]))
                    # PTX ISA, B fragment: k = 2 q, 2 q + 1, then + 8; n = g. The word holds n and n + 8.
                    for half in range(2):
                        n = 64 * block + 16 * tile + g + 8 * half
                        k = [16 * k_tile + 2 * q + step for step in (0, 1, 8, 9)]
                        assert numbers[4 * half : 4 * half + 4] == matrix[n, k].tolist()


def test_every_code_survives_lop3_exactly() -> None:
    for code in range(16):
        assert dequantize(int("".join(f"{code:x}" * 8), 16)) == [code - 8.0] * 8


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MpqError, match="MARLIN packs"):
        marlin.pack(torch.zeros(10, 16, dtype=torch.uint8))
