"""Names parse and print the same; effective bits count everything that is stored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import ALIASES, DEFAULT_FORMATS, FORMATS, ROW_FORMATS, Format, parse_format
from mpq.core.grids import int_grid


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


STANDARDS = {  # OCP MX 1.0 section 5, NVIDIA's NVFP4, ggml-common.h: spelt out
    "mxfp4": "fp4-e2m1-g32-se8m0", "mxfp6-e3m2": "fp6-e3m2-g32-se8m0", "mxfp6-e2m3": "fp6-e2m3-g32-se8m0",
    "mxfp8-e4m3": "fp8-e4m3-g32-se8m0", "mxfp8-e5m2": "fp8-e5m2-g32-se8m0", "mxint8": "int8-g32-se8m0",
    "nvfp4": "fp4-e2m1-g16-se4m3-ts", "q2_k": "uint2-g16-suint4-muint4-b16", "q3_k": "int3-g16-sint6-b16",
    "q4_k": "uint4-g32-suint6-muint6-b8", "q5_k": "uint5-g32-suint6-muint6-b8", "q6_k": "int6-g16-sint8-b16",
    "q4_1": "uint4-g32-mfp16", "q5_1": "uint5-g32-mfp16", "iq4_nl": "iq4nl-g32",
}  # fmt: skip
LISTED = """
int2-g32 int2-g64 int2-g128 int3-g32 int3-g64 int3-g128 int4-g32 int4-g64 int4-g128 int5-g32 int5-g64 int5-g128
int6-g32 int6-g64 int6-g128 int8-g32 int8-g64 int8-g128 int2-g128-asym int3-g128-asym int4-g128-asym int8-g128-asym
int2-channel int3-channel int4-channel int5-channel int6-channel int8-channel int8 nl2-g64 nl3-g64 nl4-g64 nl5-g64
nf4-g64 fp4-e2m1-g32 fp6-e3m2-channel fp6-e2m3-channel fp8-e4m3 fp8-e4m3-channel fp8-e5m2 fp8-e5m2-channel
"""


def test_standard_names_match_their_layouts():
    assert {name: parse_format(spelt) for name, spelt in STANDARDS.items()} == {
        name: format for name, format in ALIASES.items() if not format.is_float_copy
    }
    assert list(ALIASES) == [*STANDARDS, "fp32", "fp16", "bf16"]
    assert list(FORMATS) == [*LISTED.split(), *ALIASES]
    assert set(ROW_FORMATS) == {name for name in DEFAULT_FORMATS if not name.endswith("g32")}


def test_default_format_has_one_scale_per_tensor():
    assert Format(int_grid(8)) == parse_format("int8") == parse_format("int8-tensor-sfp32")
    assert [parse_format(name).groups(100) for name in ("int8", "int8-channel", "int8-g32", "bf16")] == [1, 1, 4, 0]
    assert [parse_format(name).super_groups(520) for name in ("q2_k", "q4_k", "int8-g32")] == [3, 3, 0]
    assert parse_format("fp3-e1m1").grid.values().tolist() == [0, 1, 2, 3, 0, -1, -2, -3]


def test_ggmls_names_are_understood():
    names = ("q8_0", "Q4_0", "F16", "Q4_K", "IQ4_NL", "MXFP4")
    assert [parse_format(name).name for name in names] == ["int8-g32", "int4-g32", "fp16", "q4_k", "iq4_nl", "mxfp4"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int4-g12x", "int4-g128"),
        ("nvpf4", "nvfp4"),
        ("fp8-e4m2", "4 exponent and 2 mantissa bits are not 8 bits"),
        ("fp4-e0m3", "0 exponent and 3 mantissa bits are not 4 bits"),
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
