import pytest

from mpq.core.errors import MpqError
from mpq.kernels.bench import latency_table, measure


def test_everything_asked_for_is_measured_and_becomes_a_table():
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
