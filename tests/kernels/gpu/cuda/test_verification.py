"""CUDA C++ kernels run only after they have passed on the device."""

import logging
from pathlib import Path

import pytest
import torch

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from devices import needs_device
from mpq.core.formats import parse_format
from mpq.kernels.gpu.cuda import verification
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.layout import pack, packed_of, to_layout, unpack
from mpq.rounding.reference import quantize

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verification.verified.cache_clear()


def plain(tokens, weight, bias, format, rows, shares):
    """A correct kernel's output, by the reference."""
    from mpq.rounding.reference import dequantize

    matrix = dequantize(unpack(packed_of(weight, format, (rows, tokens.shape[1]), FRAGMENTS)))
    return (tokens.double() @ matrix.double().T + bias.double()).to(tokens.dtype)


def test_right_products_pass_and_wrong_ones_do_not() -> None:
    assert verification.complaint_about(plain, CPU) == ""
    assert "is off by" in verification.complaint_about(lambda *given: plain(*given) * 1.02, CPU)
    assert "off by nan" in verification.complaint_about(
        lambda *given: plain(*given).index_fill(0, torch.tensor(0), torch.nan), CPU
    )
    assert "off by" in verification.complaint_about(lambda tokens, *rest: plain(tokens.roll(8, 1), *rest), CPU)
    turns = iter(range(99))
    unsteady = verification.complaint_about(lambda *given: plain(*given) + 1e-3 * (next(turns) % 2), CPU)
    assert "from run to run" in unsteady


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("backend", sorted(verification.BACKENDS))
def test_a_failed_verification_is_cached_and_reported_once(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not verification.verified(backend, CPU)  # never compared
        complaint = verification.check(backend, torch.device("cuda", 0))
        assert "its trial failed" in complaint
        assert verification.check(backend, torch.device("cuda", 0)) == complaint
        assert [verification.verified(backend, torch.device("cuda", 0)) for _ in range(3)] == [False] * 3
    assert len(caplog.records) == 2
    assert "never compared" in caplog.records[0].getMessage()
    assert "its trial failed" in caplog.records[1].getMessage()


def test_unverified_kernels_fall_back_to_triton() -> None:
    pytest.importorskip("triton")
    from mpq.kernels.gpu.triton.config import Config
    from mpq.kernels.gpu.triton.linear import EMULATE, compute

    if not EMULATE:
        pytest.skip("needs Triton's interpreter")
    format = parse_format("int4-g128")
    weight = list(to_layout(pack(quantize(torch.randn(48, 128), format)), FRAGMENTS).tensors.values())
    tokens = torch.randn(20, 128).half()
    expected = plain(tokens, weight, torch.zeros(48), format, 48, 1)
    for backend in verification.BACKENDS:
        output = compute(tokens, weight, None, format, 48, Config(backend=backend))
        assert float((output - expected).norm() / expected.norm()) < torch.finfo(torch.float16).eps


@needs_device
@pytest.mark.parametrize("backend", sorted(verification.BACKENDS))
def test_the_kernels_pass_on_this_device(backend: str) -> None:
    device = torch.device("cuda", 0)
    if not verification.BACKENDS[backend].runs_on(device):
        pytest.skip("the device lacks the instructions")
    assert verification.check(backend, device) == ""
    assert verification.verified(backend, device)
