"""Costs against calculations by hand."""

import pytest

from mpq.core.cache import parse_cache_format, stored_bytes
from mpq.core.costs import bitops, cache_bytes, file_bytes, kv_bytes_per_token, weight_bytes
from mpq.core.layer import KEYS, Layer
from mpq.core.scheme import Scheme, parse_scheme


def test_bytes_of_weights():
    assert weight_bytes(parse_scheme("int4-g32"), 3, 64) == 3 * (32 + 2 * 2)  # 64 codes of 4 bits, 2 scales of 16
    assert weight_bytes(parse_scheme("int8-channel"), 3, 5) == 3 * (5 + 2)
    layer = Layer("a", "linear", 3, 64)
    assert file_bytes(layer, parse_scheme("int4-g32")) == 108
    assert cache_bytes(layer, parse_scheme("int4-g32"), 10) == 0


def test_bytes_of_keys_and_values():
    eight = Scheme(parse_cache_format("int8-token"), cached=True)
    entry = Layer("layers.0.k", KEYS, 2, 32)
    assert entry.is_cached
    assert weight_bytes(eight, 2, 32) == 2 * (32 + 2)  # two heads of 32 codes and a scale
    assert file_bytes(entry, eight) == 0
    assert cache_bytes(entry, eight, context=10, batch=3) == 3 * 10 * 2 * 34
    assert cache_bytes(entry, eight, context=10) == 10 * 2 * 34
    assert cache_bytes(entry, parse_scheme("int8-channel"), 10) == 0


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("bf16", 16 * 16), ("int4-g32", 4 * 16), ("int4-channel+a:int8-token", 4 * 8), ("int3-g64", 48)],
)
def test_bit_operations(scheme, bits):
    assert bitops(parse_scheme(scheme), 10) == 10 * bits


def test_bytes_that_a_token_adds():
    assert kv_bytes_per_token(2, 3, 5, 16) == 2 * 2 * 3 * 10  # no scale
    assert kv_bytes_per_token(2, 3, 5, 4) == 2 * 2 * 3 * (3 + 4)  # 20 bits in whole bytes, scale and zero
    assert kv_bytes_per_token(2, 3, 5, 8, parameter_bytes=2) == 2 * 2 * 3 * 7


def test_bytes_of_blocks_of_tokens():
    """Blocks of 64 tokens by 32 columns: 768 bytes of codes, a scale and a zero a column; the newest 64 as floats."""
    blocks = parse_cache_format("int3-t64-asym")
    whole, newest = 64 * 32 * 3 // 8 + 32 * 4, 64 * 32 * 2
    assert [stored_bytes(blocks, 32, tokens) for tokens in (0, 10, 63)] == [0, 10 * 64, 63 * 64]
    assert [stored_bytes(blocks, 32, tokens) for tokens in (64, 65, 127)] == [whole + newest] * 3
    assert stored_bytes(blocks, 32, 200) == 3 * whole + newest
    assert stored_bytes(parse_cache_format("int8-token"), 32, 5) == 5 * 34
