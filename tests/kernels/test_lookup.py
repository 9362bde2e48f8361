import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.calibration import seeded
from mpq.core.formats import parse_format
from mpq.core.rounding import dequantize, quantize
from mpq.kernels import panels
from mpq.kernels.layout import pack, to_layout, unpack
from mpq.kernels.lookup import rows_of
from tests.kernels.test_cpu import NAMES


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 150), st.integers(1, 400), st.integers(1, 9))
def test_rows_are_those_of_the_whole_matrix(name, rows, cols, count):
    random = seeded(0, name, rows, cols)
    packed = pack(quantize(torch.randn((rows, cols), generator=random), parse_format(name)))
    wanted = torch.randint(rows, (count,), generator=random)
    found, whole = rows_of(to_layout(packed, panels.NAME), wanted), unpack(packed)
    assert torch.equal(found.codes, whole.codes[wanted])
    assert torch.equal(dequantize(found), dequantize(whole)[wanted])


@pytest.mark.parametrize(
    "indices", [torch.tensor([[2, 0], [69, 2]]), torch.tensor(64), torch.empty(0, dtype=torch.int64)]
)
def test_indices_of_any_shape(indices):
    packed = to_layout(pack(quantize(torch.randn((70, 40)), parse_format("int4-g32"))), panels.NAME)
    facts = (packed.format.name, *packed.shape, packed.layout)
    found = torch.ops.mpq.embedding(indices, list(packed.tensors.values()), *facts, torch.bfloat16)
    assert torch.equal(found, dequantize(unpack(packed))[indices].bfloat16())
