"""Names parse and print the same; effective bits count everything that is stored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format


@st.composite
def format_names(draw):
    """Names that the grammar allows, not only the well-known ones."""
    grid = draw(
        st.sampled_from(["int2", "int3", "int5", "uint8", "nf4", "fp8-e4m3", "fp8-e3m4", "fp5-e2m2", "fp4-e2m1"])
    )
    granularity = draw(st.sampled_from(["", "-channel", "-g1", "-g16", "-g100"]))
    integer = grid.startswith("int")
    asym = draw(st.sampled_from(["", "-asym"])) if integer else ""
    kinds = ["", "-sbf16", "-sfp32"] + ([] if asym else ["-se8m0", "-se4m3", "-sue5m3"])
    if granularity.startswith("-g") and not asym and draw(st.booleans()):
        minima = ["", "-muint4", "-muint6"] if grid.startswith("u") else [""]
        integers = draw(st.sampled_from(["-suint4", "-suint6", "-sint6", "-sint8"]))
        return grid + granularity + integers + draw(st.sampled_from(minima)) + draw(st.sampled_from(["-b1", "-b16"]))
    scale = draw(st.sampled_from(kinds))
    if grid.startswith("u") and draw(st.booleans()):
        return grid + granularity + scale + draw(st.sampled_from(["-mfp16", "-mbf16", "-mfp32"]))
    return grid + granularity + asym + scale + draw(st.sampled_from(["", "-ts"]))


@given(format_names())
def test_a_name_survives_parsing(name):
    format = parse_format(name)
    assert parse_format(format.name) == format


@pytest.mark.parametrize("name", FORMATS)
def test_well_known_names_are_canonical(name):
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g128", 4.125),  # 16-bit scale for 128 weights: MARLIN's 4.125
        ("int4-g128-asym", 4.15625),
        ("int2-g64", 2.25),
        ("mxfp4", 4.25),  # OCP MX: 8-bit scale for 32 elements
        ("mxfp6-e2m3", 6.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5 + 32 / 4096**2),  # 8-bit scale for 16 elements, one float32 for the tensor
        ("nf4-g64", 4.25),
        ("fp8-e4m3", 8 + 32 / 4096**2),
        ("int8-channel", 8 + 16 / 4096),
        ("bf16", 16),
        ("q2_k", 2.625),  # ggml-common.h: 84 bytes for 256 weights
        ("q3_k", 3.4375),  # 110
        ("q4_k", 4.5),  # 144
        ("q5_k", 5.5),  # 176
        ("q6_k", 6.5625),  # 210
        ("q4_1", 5),  # 20 bytes for 32
        ("q5_1", 6),  # 24
        ("iq4_nl", 4.5),  # 18
    ],
)
def test_effective_bits(name, bits):
    assert parse_format(name).effective_bits(4096, 4096) == bits


def test_rows_and_zero_points_fill_whole_bytes():
    # A row of 7 codes of 3 bits fills 3 bytes, its 2 scales 4 bytes, its 2 zero points of 3 bits 1 byte.
    assert parse_format("int3-g4-asym").nbytes(3, 7) == 3 * (3 + 2 * 2 + 1)
    assert parse_format("int4-g128").nbytes(10, 27) == 10 * (14 + 2)
    assert parse_format("fp16").nbytes(10, 27) == 540
    # A row of 260 weights of q2_k: 65 bytes of codes, 17 scales and 17 minima of 4 bits in 9 bytes each, and for its
    # 2 super-blocks two float16 each.
    assert parse_format("q2_k").nbytes(3, 260) == 3 * (65 + 9 + 9 + 2 * 2 * 2)


def test_ggmls_names_are_understood():
    names = ("q8_0", "Q4_0", "F16", "Q4_K", "IQ4_NL", "MXFP4")
    assert [parse_format(name).name for name in names] == ["int8-g32", "int4-g32", "fp16", "q4_k", "iq4_nl", "mxfp4"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int4-g12x", "int4-g128"),
        ("nvpf4", "nvfp4"),
        ("fp8-e4m2", "4 exponent and 2 mantissa bits are not 8 bits"),
        ("nf4-g64-asym", "only int2 to int8"),
        ("int4-g32-asym-se8m0", "use fp16"),
        ("int4-g32-sfp9", "expected one of fp32"),
        ("int4-g32-suint6", "go with super-blocks"),
        ("int4-g32-b8", "go with super-blocks"),
        ("int4-channel-sint8-b8", "made of groups"),
        ("int4-g32-mfp16", "uint grids take fp32, fp16, bf16"),
        ("uint4-g32-suint6-mfp16-b8", "uint grids take uint4, uint6"),
        ("uint4-g32-mfp16-ts", "cannot have the minimum"),
        ("int4-g32-asym-sint8-b8", "leave out -asym"),
        ("int4-g32-sint8-b8-asym", "unknown"),
        ("", "known names"),
    ],
)
def test_invalid_names_give_the_cure(name, hint):
    with pytest.raises(MpqError, match=hint):
        parse_format(name)
