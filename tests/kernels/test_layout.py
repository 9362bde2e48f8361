import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.kernels import layout
from mpq.kernels.layout import LAYOUTS, Layout, Packed, pack, pack_bits, take_rows, tensor_specs, to_layout, unpack
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize, quantize

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 140))


def random_matrix(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed, shape))


def same(first, second):
    for name in ("codes", "scales", "zeros", "tensor_scale"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), SHAPES, st.integers(0, 3))
def test_packing_is_lossless_and_has_the_predicted_size(name, shape, seed):
    format = FORMATS[name]
    quantized = quantize(random_matrix(shape, seed), format)
    packed = pack(quantized)
    same(unpack(packed), quantized)
    assert packed.nbytes == format.nbytes(*shape)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in packed.tensors.items()}
    assert found == tensor_specs(format, *shape)
    assert list(found) == list(tensor_specs(format, *shape))  # the order is part of the contract


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 30), st.randoms(use_true_random=False))
def test_bit_streams_equal_a_big_integer(bits, rows, cols, random):
    codes = [[random.randrange(2**bits) for _ in range(cols)] for _ in range(rows)]
    stream = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    for row, line in zip(codes, stream.tolist(), strict=True):
        number = sum(code << (bits * index) for index, code in enumerate(row))
        assert bytes(line) == number.to_bytes(-(-cols * bits // 8), "little")


@pytest.mark.parametrize("name", ["int3-g32", "int4-g32-asym", "nvfp4", "int8", "bf16"])
def test_chosen_rows_equal_rows_of_the_whole(name):
    packed = pack(quantize(random_matrix((9, 70)), parse_format(name)))
    rows = torch.tensor([4, 0, 4, 8])
    assert torch.equal(dequantize(unpack(take_rows(packed, rows))), dequantize(unpack(packed))[rows])


@pytest.fixture
def backwards(monkeypatch):
    """A layout whose bytes run backwards, for integer formats."""

    def flip(packed, to):
        return Packed(packed.format, packed.shape, to, {key: t.flip(0) for key, t in packed.tensors.items()})

    mine = Layout(
        lambda packed: flip(packed, "backwards"),
        lambda packed: flip(packed, "rows"),
        LAYOUTS["rows"].names,
        lambda packed, device: packed.format.grid.family == "int",
    )
    monkeypatch.setitem(layout.LAYOUTS, "backwards", mine)


def test_the_most_suitable_layout_is_chosen_and_undone(backwards, monkeypatch):
    monkeypatch.delitem(LAYOUTS, "panels", raising=False)
    quantized = quantize(random_matrix((4, 40)), parse_format("int4-g32-asym"))
    packed = pack(quantized)
    assert layout.best_layout(packed, torch.device("cpu")) == "backwards"
    arranged = to_layout(packed, "backwards")
    assert not torch.equal(arranged.tensors["packed"], packed.tensors["packed"])
    same(unpack(arranged), quantized)
    other = pack(quantize(random_matrix((4, 40)), parse_format("nf4-g64")))
    assert layout.best_layout(other, torch.device("cpu")) == "rows"


def test_unknown_layout_is_refused():
    packed = pack(quantize(random_matrix((2, 2)), parse_format("int8")))
    with pytest.raises(MpqError, match="unknown layout 'row': did you mean rows"):
        to_layout(packed, "row")
