"""Names and bytes of the formats of cached keys and values."""

import pytest

from mpq.core.cache import CACHE_FORMATS, affine, cache_name, head_bytes, parse_cache_format
from mpq.core.errors import MpqError

OTHERS = (
    "fp16", "bf16", "fp8-e4m3", "fp8-e4m3-token", "mxfp4", "nvfp4", "int3-token", "uint4-token-mbf16", "nf4-g32",
)  # fmt: skip


@pytest.mark.parametrize("name", [*CACHE_FORMATS, *OTHERS])
def test_names_parse_and_print_the_same(name: str) -> None:
    format = parse_cache_format(name)
    assert parse_cache_format(cache_name(format)) == format


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("int3", "int3-token"), ("int8", "int8-token"), ("int4-asym", "int4-token-asym"), ("q8_0", "int8-g32"),
        ("int4-g32-asym", "int4-g32-asym"), ("uint4-token-mfp16", "int4-token-asym"), ("NVFP4", "nvfp4"),
    ],
)  # fmt: skip
def test_short_names_mean_one_scale_per_vector(name: str, canonical: str) -> None:
    assert cache_name(parse_cache_format(name)) == canonical


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", 128), ("fp8-e4m3", 64), ("fp8-e4m3-token", 66), ("int8-token", 66), ("int4-g32", 36),
        ("int4-g32-asym", 40), ("int3", 26), ("int2-asym", 20), ("mxfp4", 34), ("nvfp4", 36),
    ],
)  # fmt: skip
def test_bytes_of_a_vector_of_64(name: str, expected: int) -> None:
    assert head_bytes(parse_cache_format(name), 64) == expected


def test_candidates_are_ordered_by_bytes() -> None:
    sizes = [head_bytes(parse_cache_format(name), 64) for name in CACHE_FORMATS]
    assert sizes == sorted(sizes)


def test_turbomind_s_formats_are_the_asymmetric_ones() -> None:
    assert cache_name(affine(4)) == "int4-token-asym"


def test_unsupported_cache_formats_are_refused() -> None:
    with pytest.raises(MpqError, match="super-blocks"):
        parse_cache_format("q4_k")
    with pytest.raises(MpqError, match="the mix"):
        parse_cache_format("int2-g32/int4-g32@3")
    with pytest.raises(MpqError, match="unknown format"):
        parse_cache_format("int9")
