"""The CUDA backend as models use it. Tests that need a device are skipped without one; the rest is interpreted."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpq.kernels.ops  # noqa: F401  (defines torch.ops.mpq)
from devices import COMPILED, needs_device
from mpq.core.scheme import parse_scheme
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.layout import pack, packed_of, to_layout
from mpq.kernels.modules import PackedLinear
from mpq.kernels.weight import PackedWeight
from mpq.rounding.reference import dequantize, quantize

SCHEMES = [
    "int4-g128", "int3-g32-asym", "nvfp4", "nf4-g64", "fp6-e3m2-channel",
    "int4-g128+a:int8-token", "fp8-e4m3-channel+a:fp8-e4m3-token", "mxfp4+a:mxfp8-e4m3", "int4-g32+a:bf16",
]  # fmt: skip
SIXTEEN = [torch.float16, torch.bfloat16]
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_pin_memory")


class Waits(TorchDispatchMode):
    """Fails on operators that synchronize with the device, because their result's value or shape is read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in WAITING, f"{func} makes the host wait"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask's count is read"
        return func(*args, **(kwargs or {}))


def packed(scheme: str, rows: int, cols: int, device: str = "cpu") -> tuple[list[Tensor], Tensor, str]:
    """Fragments, the float32 matrix that they stand for, and the activation's format."""
    parsed = parse_scheme(scheme)
    quantized = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)), parsed.weight)
    tensors = to_layout(pack(quantized), FRAGMENTS).tensors.values()
    activation = "" if parsed.activation is None else parsed.activation.name
    return [tensor.to(device) for tensor in tensors], dequantize(quantized).to(device), activation


@pytest.mark.skipif(COMPILED, reason="on a device the captured graph shows the same")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_synchronizes_with_the_device(scheme: str) -> None:
    pytest.importorskip("triton")
    from mpq.kernels.gpu.triton.linear import linear

    weight, _, activation = packed(scheme, 40, 200)
    name, x = parse_scheme(scheme).weight.name, torch.randn(5, 200).half()
    first = linear(x, weight, None, name, 40, 200, FRAGMENTS, activation)  # one-time reads happen here
    with Waits():
        second = linear(x, weight, None, name, 40, 200, FRAGMENTS, activation)
    assert torch.equal(first, second)


def test_synchronization_is_detected() -> None:
    x = torch.ones(3)
    with Waits():
        for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool((x > 0).all()), lambda: x.nonzero()):
            with pytest.raises(AssertionError, match=r"wait|count"):
                wait()


@needs_device
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_captured_graphs_replay_on_new_inputs(scheme: str, dtype: torch.dtype) -> None:
    weight, _, activation = packed(scheme, 512, 1024, "cuda")
    facts = (parse_scheme(scheme).weight.name, 512, 1024, FRAGMENTS, activation)
    for tokens in (1, 16, 100):
        x, other = torch.randn(2, tokens, 1024, device="cuda").to(dtype)
        expected = [torch.ops.mpq.linear(one, weight, None, *facts) for one in (x, other)]  # compiles, before capture
        graph, kept = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            output = torch.ops.mpq.linear(kept, weight, None, *facts)
        for one, truth in zip((x, other, x), (*expected, expected[0]), strict=True):
            kept.copy_(one)
            output.fill_(torch.nan)
            graph.replay()
            assert torch.equal(output, truth)  # bit-identical to the call outside of the graph, each time


@needs_device
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_models_are_one_graph(scheme: str) -> None:
    weight, _, activation = packed(scheme, 256, 512, "cuda")
    held = PackedWeight(packed_of(weight, parse_scheme(scheme).weight, (256, 512), FRAGMENTS), torch.bfloat16)
    model = nn.Sequential(PackedLinear(held, torch.ones(256, device="cuda").bfloat16(), activation), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for tokens in (1, 16, 16, 16):
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)


@needs_device
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", ["int4-g128", "int2-g64-asym", "int8-channel", "fp8-e4m3-channel", "mxfp4", "nf4-g64"])
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1000, 4104), (11008, 4096)])
def test_large_products_on_the_device(name: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    weight, matrix, _ = packed(name, rows, cols, "cuda")
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        for tokens in (1, 3, 16, 64, 130):
            x = torch.randn(cols, tokens, device="cuda").to(dtype).T  # strided
            outputs = [torch.ops.mpq.linear(x, weight, None, name, rows, cols, FRAGMENTS, "") for _ in range(2)]
            truth = x.double() @ matrix.double().T
            assert float((outputs[0].double() - truth).norm() / truth.norm()) < 2 * torch.finfo(dtype).eps
            assert torch.equal(outputs[0], outputs[1])
    finally:
        torch.use_deterministic_algorithms(False)


@needs_device
def test_products_run_on_the_inputs_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    weight, matrix, _ = packed("int4-g128", 128, 256, "cuda:1")
    x = torch.randn(4, 256, device="cuda:1").half()
    output = torch.ops.mpq.linear(x, weight, None, "int4-g128", 128, 256, FRAGMENTS, "")
    torch.testing.assert_close(output.float(), x.float() @ matrix.T, rtol=1e-2, atol=0.1)
