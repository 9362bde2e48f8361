"""Blocks of cached vectors: lossless, of the bytes that the cost model counts, and in the order of cpu/src/abi.h."""

import pytest
import torch

from mpq.core.cache import head_bytes, parse_cache_format
from mpq.kernels.blocks import TOKENS, arrange, block_bytes, padded, restore, supports
from mpq.kernels.kv_cache import quantize_heads
from mpq.network.calibration import seeded

FORMATS = (
    "int2-asym", "int3-g32", "int4-token", "int4-g32-asym", "int6-asym", "int8-token", "int8-asym", "fp8-e4m3",
    "fp8-e4m3-token", "mxfp4", "nvfp4", "nf4", "fp16", "bf16", "fp32",
)  # fmt: skip


def heads_of(name, tokens=70, width=80, heads=3, seed=0):
    vectors = torch.randn(1, heads, tokens, width, generator=seeded(seed, name))
    return quantize_heads(vectors, parse_cache_format(name))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width", [64, 80, 20])
def test_arranging_blocks_is_lossless(name, values, width):
    heads = heads_of(name, width=width)
    blocks = arrange(heads, values)
    assert blocks.shape == (3, 2, block_bytes(heads.format, width))
    again = restore(blocks, heads.format, width, values)
    assert again.tokens == 2 * TOKENS
    for one, other in zip(heads.tensors, again.tensors, strict=True):
        assert torch.equal(other[:, :, : heads.tokens], one)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_per_token_match_the_cost_model(name):
    format = parse_cache_format(name)
    assert block_bytes(format, 128) == TOKENS * head_bytes(format, 128)


def test_codes_are_in_the_order_of_the_kernels():
    keys, values = (arrange(heads_of("int8-token"), which)[1, 1] for which in (False, True))
    codes = heads_of("int8-token").codes[0, 1]
    token, column = TOKENS + 5, 23  # token 5 of the second block
    assert keys[0 * 16 * padded(80) + column // 4 * 64 + 5 * 4 + column % 4] == codes[token, column]
    assert values[column // 16 * 64 * 16 + 5 // 4 * 64 + column % 16 * 4 + 5 % 4] == codes[token, column]


def test_groups_that_lanes_would_cross_are_not_supported():
    assert not supports(parse_cache_format("int4-g20"), 80)
    assert supports(parse_cache_format("int4-g32"), 80)
    assert supports(parse_cache_format("int4-g100"), 64)
