"""The structs of abi.py against the library's table of its own, and the planner's choice of a path."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.kernels.cpu import abi
from mpq.kernels.cpu import native as cpu

found = cpu.native()
pytestmark = pytest.mark.skipif(
    found is None or not hasattr(found.library, "mpq_fields"),
    reason="the kernels are not compiled here, or from older sources: pip install -e . with a C compiler",
)
STRUCTS = {"mpq_weight": abi.Weight, "mpq_call": abi.Call, "mpq_images": abi.Images, "mpq_part": abi.Part,
           "mpq_layer": abi.Layer, "mpq_block": abi.Block, "mpq_decoder": abi.Decoder, "mpq_token": abi.Token,
           "mpq_vectors": abi.Vectors, "mpq_slab": abi.Slab, "mpq_sequence": abi.Sequence,
           "mpq_attention": abi.Attention, "mpq_append": abi.Append, "mpq_block_cache": abi.BlockCache}  # fmt: skip


def in_c():
    """(offset, size) by "struct" and "struct.field"."""
    found.library.mpq_fields.restype = ctypes.POINTER(abi.Field)
    table, index, fields = found.library.mpq_fields(), 0, {}
    while table[index].name:
        fields[table[index].name.decode()] = (table[index].offset, table[index].size)
        index += 1
    return fields


def in_python():
    fields = {}
    for name, struct in STRUCTS.items():
        fields[name] = (0, ctypes.sizeof(struct))
        for field, *_ in struct._fields_:
            fields[f"{name}.{field}"] = (getattr(struct, field).offset, getattr(struct, field).size)
    return fields


def test_every_field_has_the_offset_and_size_of_c():
    assert in_python() == in_c()


FUSED, VECTORS, AMX_SMALL, AMX_INT8, AMX_BF16 = range(5)
AMX = len(cpu.LEVELS) - 1
INT4_G128 = {"bits": 4, "kind": 0, "segment": 128, "bf16_terms": 2}
INT4_G32 = {"bits": 4, "kind": 0, "segment": 32, "bf16_terms": 2}
INT8 = {"bits": 8, "kind": 0, "segment": 128, "bf16_terms": 2, "row_scales": 1}
INT2 = {"bits": 2, "kind": 0, "segment": 64, "bf16_terms": 2}
NVFP4 = {"bits": 4, "kind": 1, "segment": 16, "bf16_terms": 1}
NF4 = {"bits": 4, "kind": 2, "segment": 64, "bf16_terms": 2}
FP8 = {"bits": 8, "kind": 3, "segment": 128, "bf16_terms": 1, "normal_mask": 0x78}


def path(weight, level, tokens, planes=2, bf16=0):
    return found.library.mpq_path(ctypes.byref(abi.Weight(**weight)), level, ctypes.c_int64(tokens), planes, bf16)


@pytest.mark.skipif(cpu.LEVELS[-1] != "amx", reason="AMX is x86-64's")
@pytest.mark.parametrize(
    ("weight", "planes", "bf16", "changes"),
    [
        (INT4_G128, 2, 0, {1: FUSED, 5: AMX_SMALL, 9: AMX_INT8}),
        (INT4_G128, 2, 1, {1: FUSED, 5: AMX_SMALL, 9: AMX_INT8, 128: AMX_BF16}),
        (INT4_G128, 1, 0, {1: FUSED, 5: VECTORS, 6: AMX_SMALL, 17: AMX_INT8}),
        (INT4_G32, 2, 0, {1: FUSED, 5: AMX_SMALL, 9: AMX_INT8, 65: AMX_BF16}),
        (INT2, 2, 0, {1: FUSED, 4: AMX_SMALL, 9: AMX_INT8}),
        (INT8, 2, 0, {1: FUSED, 5: AMX_SMALL, 6: AMX_INT8}),
        (INT8, 2, 1, {1: FUSED, 5: AMX_SMALL, 6: AMX_INT8, 64: AMX_BF16}),
        (NVFP4, 2, 0, {1: FUSED, 5: VECTORS, 8: AMX_BF16}),
        (NF4, 2, 0, {1: FUSED, 3: AMX_SMALL, 9: AMX_INT8}),
        (NF4, 1, 0, {1: FUSED, 5: AMX_SMALL, 17: AMX_BF16}),
        (FP8, 2, 0, {1: FUSED, 5: VECTORS, 8: AMX_BF16}),
    ],
)
def test_paths_change_at_the_measured_thresholds_with_amx(weight, planes, bf16, changes):
    chosen = [path(weight, AMX, tokens, planes, bf16) for tokens in range(1, 257)]
    assert {t: p for t, p in enumerate(chosen, 1) if t == 1 or p != chosen[t - 2]} == changes


@given(
    st.sampled_from([INT4_G128, INT4_G32, INT8, INT2, NVFP4, NF4, FP8]), st.integers(0, AMX - 1), st.integers(1, 256),
    st.integers(1, 2), st.integers(0, 1),
)  # fmt: skip
def test_no_path_of_the_matrix_unit_without_one(weight, level, tokens, planes, bf16):
    fused = cpu.LEVELS[level] == "avx512" and tokens <= 4
    assert path(weight, level, tokens, planes, bf16) in ((FUSED, VECTORS) if fused else (VECTORS,))
