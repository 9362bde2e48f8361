"""The layout "fragments" against the tensor cores' fragment tables and by round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.kernels.gpu import backend as gpu
from mpq.kernels.gpu import fragments
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import dequantize, quantize

COVERED = [name for name in FORMATS if fragments.covers(parse_format(name))]


@given(rows=st.integers(1, 40), cols=st.integers(1, 140), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_every_pair_of_bits_and_tiles_is_an_invertible_permutation(rows: int, cols: int, bits: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = fragments.pack_fields(fragments.to_lanes(codes), bits)
    assert torch.equal(fragments.from_lanes(fragments.unpack_fields(packed, bits), rows, cols), codes)
    stored = sum(tensor.nbytes for tensor in packed.values())
    assert stored * 8 == (rows + -rows % 16) * (cols + -cols % 64) * bits


def test_lanes_hold_the_left_fragment_of_m16n8k16() -> None:
    rows, cols = 19, 70
    codes = torch.randint(256, (rows, cols), dtype=torch.uint8)
    lanes = fragments.to_lanes(codes)
    matrix = torch.nn.functional.pad(codes, (0, 58, 0, 13))
    # PTX ISA, A fragment of mma.m16n8k16, registers a0 to a7: row g or g + 8; column 2 q + (i & 1), + 8 for i >= 4
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(8):
            row, col = g + 8 * (i >> 1 & 1), 2 * q + (i & 1) + 8 * (i >> 2)
            register, half = i >> 1, i & 1  # register 0: row g; 1: row g + 8; 2: row g, columns + 8; 3: both
            for tile in range(4):
                assert lanes[1, 1, lane, tile, register + 4 * half] == matrix[16 + row, 64 + 16 * tile + col]


@pytest.mark.parametrize("name", [*COVERED, "int7-g16-asym", "fp5-e2m2-channel"])
def test_arranging_is_lossless(name: str) -> None:
    format = parse_format(name)
    rows = pack(quantize(torch.randn(19, 70, generator=torch.Generator().manual_seed(1)), format))
    arranged = to_layout(rows, fragments.FRAGMENTS)
    assert tuple(arranged.tensors) == fragments.names(format)
    restored = to_layout(arranged, "rows").tensors
    assert all(torch.equal(restored[key], tensor) for key, tensor in rows.tensors.items())
    assert [tensor.dtype for tensor in restored.values()] == [tensor.dtype for tensor in rows.tensors.values()]


def test_float_copies_are_not_rearranged() -> None:
    with pytest.raises(MpqError, match="float copy"):
        to_layout(pack(quantize(torch.ones(2, 2), parse_format("bf16"))), fragments.FRAGMENTS)


@pytest.mark.parametrize("name", ["int4-g32", "int3-g16-asym", "int8", "nvfp4", "fp6-e3m2-channel"])
def test_embeddings_unpack_only_the_selected_rows(name: str) -> None:
    format = parse_format(name)
    quantized = quantize(torch.randn(37, 70, generator=torch.Generator().manual_seed(2)), format)
    weight = list(to_layout(pack(quantized), fragments.FRAGMENTS).tensors.values())
    indices = torch.tensor([[0, 36, 5], [16, 15, 5]])
    rows = gpu.embedding(indices, weight, format.name, 37, 70, fragments.FRAGMENTS, torch.float32)
    assert torch.equal(rows, dequantize(quantized)[indices])
    assert gpu.embedding(indices[:0], weight, format.name, 37, 70, fragments.FRAGMENTS, torch.float32).shape == (
        0,
        3,
        70,
    )
