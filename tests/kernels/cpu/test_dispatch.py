"""torch.ops.mpq.linear called by PyTorch's dispatcher, against the path through Python."""

import ctypes
import gc
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mpq.kernels.ops as ops
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.kernels.cpu import dispatch, panels
from mpq.kernels.cpu import native as cpu
from mpq.kernels.layout import pack, to_layout
from mpq.network.calibration import seeded
from mpq.rounding.reference import quantize

found = cpu.native()
pytestmark = pytest.mark.skipif(
    found is None or not dispatch.serve(found.library, found.level, found.parallel),
    reason="the kernels are not compiled here, or this PyTorch lacks its stable C interface's newest functions",
)
ROWS, COLS = 70, 300


def random(*shape):
    return torch.randn(shape, generator=seeded(0, shape))


def weight(name="int4-g128", rows=ROWS, cols=COLS):
    """The op's arguments between input and activation, without bias; registered with the library."""
    arranged = to_layout(pack(quantize(random(rows, cols), parse_format(name))), panels.NAME)
    cpu._plan(name, rows, cols)
    return list(arranged.tensors.values()), (name, rows, cols, panels.NAME)


INPUTS = {
    "a row": random(COLS),
    "rows": random(5, COLS),
    "rows apart": random(5, COLS + 3)[:, :COLS],
    "no rows": random(2, 0, COLS),
    "leading sizes": random(2, 3, 1, COLS),
    "leading sizes apart": random(2, 6, COLS)[:, :3],
    "sizes of one": random(4, 7, COLS)[1:2, :, None],
    "one row again": random(1, COLS).expand(4, COLS),
    "turned": random(3, 4, COLS).transpose(0, 1),
    "columns apart": random(COLS, 5).T,
    "bfloat16": random(5, COLS).bfloat16(),
    "float16": random(5, COLS).half(),
    "float64": random(5, COLS).double(),
    "NaN": torch.full((2, COLS), float("nan")),
    "infinite in one row": torch.cat([torch.full((1, COLS), float("inf")), random(1, COLS)]),
    "many sizes": random(*[1] * 9, COLS),
}
BIASES = {"none": None, "float32": random(ROWS), "bfloat16": random(ROWS).bfloat16(), "float16": random(ROWS).half(),
          "apart": random(ROWS, 2)[:, 0]}  # fmt: skip


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ["int4-g128", "nvfp4", "fp8-e4m3-channel"])
@pytest.mark.parametrize("activation", ["", "int8-channel", "mxfp8-e4m3"])
def test_every_call_matches_the_python_path(name, activation, kind, bias):
    tensors, facts = weight(name)
    call = (INPUTS[kind], tensors, BIASES[bias], *facts, activation)
    try:
        other = torch.ops.mpq.linear_any(*call)
    except MpqError as error:  # no format holds NaN
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            torch.ops.mpq.linear(*call)
        return
    with torch.inference_mode():
        served = torch.ops.mpq.linear(*call)
    assert served.dtype == other.dtype
    assert served.stride() == other.stride()
    assert torch.equal(served.isnan(), other.isnan())
    assert torch.equal(served.nan_to_num(), other.nan_to_num())


def parts(names=("int2-g64", "int4-g64"), rows=ROWS):
    """Arguments of linear_parts before and after the bias; rows take the formats round-robin."""
    tensors, counts = [], [len(range(place, rows, len(names))) for place in range(len(names))]
    for name, count in zip(names, counts, strict=True):
        arranged = to_layout(pack(quantize(random(count, COLS), parse_format(name))), panels.NAME)
        cpu._plan(name, count, COLS)
        tensors += arranged.tensors.values()
    places = torch.cat([torch.arange(place, rows, len(names)) for place in range(len(names))])
    return (tensors, places), ("/".join(names), counts, COLS, panels.NAME)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("names", [("int2-g64", "int4-g64"), ("int8-channel", "fp8-e4m3-channel", "int3-channel")])
@pytest.mark.parametrize("activation", ["", "int8-channel", "mxfp8-e4m3"])
def test_every_call_of_parts_matches_the_python_path(names, activation, kind, bias):
    weights, facts = parts(names)
    call = (INPUTS[kind], *weights, BIASES[bias], *facts, activation)
    try:
        other = torch.ops.mpq.linear_parts_any(*call)
    except MpqError as error:  # no format holds NaN
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            torch.ops.mpq.linear_parts(*call)
        return
    with torch.inference_mode():
        served = torch.ops.mpq.linear_parts(*call)
    assert served.dtype == other.dtype
    assert torch.equal(served.isnan(), other.isnan())
    exact = served.dtype == torch.float32 or BIASES[bias] is None  # in 16 bits Python adds the bias to a rounded sum
    torch.testing.assert_close(served, other, rtol=0 if exact else 2**-7, atol=1e-6 if exact else 2**-6, equal_nan=True)


def test_plain_calls_of_parts_bypass_python(monkeypatch):
    def fail(*arguments):
        raise AssertionError("Python was called")

    weights, facts = parts()
    monkeypatch.setitem(ops.KERNELS, ("linear", panels.NAME, "cpu"), fail)
    torch.ops.mpq.linear_parts(random(2, COLS), *weights, random(ROWS), *facts, "")
    many, many_facts = parts(("int2-g64", "int3-g64", "int4-g64") * 6)  # more parts than C takes
    for call in ((random(2, COLS).half(), *weights, None, *facts, ""), (random(COLS), *many, None, *many_facts, "")):
        with pytest.raises(RuntimeError, match="Python was called"):
            torch.ops.mpq.linear_parts(*call)


def test_plain_calls_bypass_python(monkeypatch):
    def fail(*arguments):
        raise AssertionError("Python was called")

    tensors, facts = weight()
    monkeypatch.setitem(ops.KERNELS, ("linear", panels.NAME, "cpu"), fail)
    torch.ops.mpq.linear(random(2, COLS), tensors, random(ROWS), *facts, "")
    with pytest.raises(RuntimeError, match="Python was called"):
        torch.ops.mpq.linear(random(2, COLS).half(), tensors, None, *facts, "")


def test_errors_name_the_given_shapes():
    tensors, facts = weight()
    with pytest.raises(RuntimeError, match=r"shape \(2, 7\) to a layer of 300 columns"):
        torch.ops.mpq.linear(random(2, 7), tensors, None, *facts, "")
    with pytest.raises(RuntimeError, match="unknown format 'int9'"):
        torch.ops.mpq.linear(random(2, COLS), tensors, None, *facts, "int9")


def test_thousands_of_weights_are_computed_correctly():
    """More weights than the table holds: the others are computed through Python."""
    for cols in range(1, 5001):
        cpu._plan("int8-channel", 3, cols)
    for cols in (1, 100, 2500, 5000):
        tensors, facts = weight("int8-channel", 3, cols)
        x = random(2, cols)
        served = torch.ops.mpq.linear(x, tensors, None, *facts, "")
        assert torch.equal(served, torch.ops.mpq.linear_any(x, tensors, None, *facts, ""))


def test_modes_see_the_op():
    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors, facts = weight()
    with Seen() as seen:
        torch.ops.mpq.linear(random(2, COLS), tensors, None, *facts, "")
    assert "mpq.linear.default" in seen.names


class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def megabytes_in_use():
    """Allocated and not freed memory by the C library's statistics."""
    books = ctypes.CDLL(None).mallinfo2
    books.restype = Heap
    heap = books()
    return (heap.uordblks + heap.hblkhd) / 1e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library has no heap statistics")
@pytest.mark.parametrize("fill", [0.5, float("nan")], ids=["served", "left to Python"])
def test_calls_do_not_leak_memory(fill):
    """Each call has a megabyte of inputs of its own, and as much output."""
    tensors, facts = weight("int2-g64", 1024, 1024)
    weights, part_facts = parts(("int2-g64", "int4-g64"), 1024)
    bias, calls = random(1024), 60

    def run(times):
        for _ in range(times):
            torch.ops.mpq.linear(torch.full((256, 1024), fill), tensors, bias, *facts, "")
            torch.ops.mpq.linear_parts(torch.full((256, COLS), fill), *weights, bias, *part_facts, "")
        gc.collect()
        return megabytes_in_use()

    before = run(5)
    assert run(calls) - before < calls / 10
