import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.formats import parse_format
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu import panels
from mpq.kernels.layout import pack, to_layout, unpack
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize, quantize
from tests.kernels.cpu.test_native import NAMES

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")


def rows_of(packed, indices, dtype=torch.float32):
    facts = (packed.format.name, *packed.shape, packed.layout)
    return torch.ops.mpq.embedding(indices, list(packed.tensors.values()), *facts, dtype)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 150), st.integers(1, 400), st.integers(1, 9))
def test_looked_up_rows_equal_the_unpacked_matrix(name, rows, cols, count):
    random = seeded(0, name, rows, cols)
    packed = pack(quantize(torch.randn((rows, cols), generator=random), parse_format(name)))
    wanted = torch.randint(rows, (count,), generator=random)
    assert torch.equal(rows_of(to_layout(packed, panels.NAME), wanted), dequantize(unpack(packed))[wanted])


@pytest.mark.parametrize(
    "indices",
    [torch.tensor([[2, 0], [69, 2]]), torch.tensor(64), torch.empty(0, dtype=torch.int64),
     torch.tensor([[5, 1, 3]]).t(), torch.tensor([7, 69], dtype=torch.int32)],
)  # fmt: skip
def test_indices_of_any_shape(indices):
    packed = to_layout(pack(quantize(torch.randn((70, 40)), parse_format("int4-g32"))), panels.NAME)
    found = rows_of(packed, indices, torch.bfloat16)
    assert torch.equal(found, dequantize(unpack(packed))[indices].bfloat16())


@pytest.mark.parametrize("index", [-1, 70, 127])
def test_out_of_range_indices_are_refused(index):
    packed = to_layout(pack(quantize(torch.randn((70, 40)), parse_format("int4-g32"))), panels.NAME)
    with pytest.raises(IndexError, match="0 to 69"):
        rows_of(packed, torch.tensor([0, index]))
