import pytest
import torch

from devices import needs_device
from mpq.core.errors import MpqError
from mpq.kernels.bench import device_of, latency_table, measure


def test_every_requested_format_is_measured_into_a_table():
    schemes = ["int4-g128", "int8-channel+a:int8-token", "bf16"]
    found = list(measure(schemes, [(64, 128), (70, 256)], [1, 3], repeats=3, beyond=2**20))
    assert {(timing.scheme, timing.rows, timing.cols, timing.batch) for timing in found} == {
        (scheme, *shape, batch) for scheme in schemes for shape in [(64, 128), (70, 256)] for batch in (1, 3)
    }
    for timing in found:
        assert 0 < timing.fastest <= timing.seconds
        assert timing.roof == pytest.approx(timing.nbytes / timing.seconds / timing.bandwidth)
    table = latency_table(found)
    assert table.seconds("int4-g128", 70, 256, 3) == next(
        timing.seconds for timing in found if (timing.scheme, timing.rows, timing.batch) == ("int4-g128", 70, 3)
    )


def test_unknown_schemes_are_errors():
    with pytest.raises(MpqError, match="int44"):
        next(measure(["int44"]))


def test_devices_are_checked_before_anything_is_timed():
    assert device_of("cpu").type == "cpu"
    for name in ("gpu", "cuda:x", "cpu:1", "meta", ""):
        with pytest.raises(MpqError, match="cpu, cuda or cuda:N"):
            device_of(name)
    if torch.cuda.is_available():
        assert device_of("cuda").type == "cuda"
        with pytest.raises(MpqError, match="CUDA devices"):
            device_of("cuda:99")
    else:
        with pytest.raises(MpqError, match="finds none here"):
            device_of("cuda")


@needs_device
def test_a_gpu_is_measured_by_the_same_table():
    device = device_of("cuda")
    schemes = ["int4-g128", "int8-channel+a:int8-token", "bf16"]
    found = list(measure(schemes, [(512, 512)], [1, 16], repeats=3, beyond=2**24, device=device))
    assert len(found) == 6
    assert all(timing.seconds > 0 and timing.bandwidth > 1e10 and timing.bfloat16 > 0 for timing in found)
    table = latency_table(found, device)
    assert table.provenance["device"] == torch.cuda.get_device_name(device)
    assert table.seconds("int4-g128", 512, 512, 16) > 0
