import pytest

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.layer import Layer
from mpq.core.taxonomy import Precision, classify


def allocation(*schemes):
    return Allocation(tuple(Layer(f"l{i}", "linear", 64, 64) for i in range(len(schemes))), schemes)


def test_the_cache_is_a_separate_axis():
    entries = tuple(Layer(f"cache.{i}.keys", "keys", 2, 64) for i in range(2))
    for names, kind in ((("fp16", "bf16"), "float"), (("int4", "int4"), "uniform"), (("int4", "fp16"), "mixed")):
        found = classify(allocation("int4-g64", "int8-channel").with_cache(CacheFormats(entries, names)))
        assert (found.label, found.cache) == ("MPW", kind)
    assert str(found) == "MPW, mixed cache"


@pytest.mark.parametrize(
    ("schemes", "label", "weights", "activations"),
    [
        (("int4-g64", "int8-channel"), "MPW", "mixed", "float"),  # W-int{4,8} A-FP16
        (("int4-g64", "bf16"), "MPW", "mixed", "float"),
        (("int4-g64", "int4-g32"), "MPW", "mixed", "float"),
        (("int4-g64+a:int8-token", "int8-channel+a:int8-token"), "MPW+UPA", "mixed", "uniform"),
        (("int4-g64+a:int8-token", "int8-channel"), "MPW+MPA", "mixed", "mixed"),  # A-{int8, float}
        (("int4-g64+a:int8-token", "int8-channel+a:fp8-e4m3-token"), "MPW+MPA", "mixed", "mixed"),
        (("int4-g64", "int4-g64"), "uniform", "uniform", "float"),  # weight-only
        (("int4-g64+a:int8-token",) * 2, "uniform", "uniform", "uniform"),  # W4A8
        (("int4-g64+a:int8-token", "int4-g64"), "uniform", "uniform", "mixed"),
        (("bf16", "fp16"), "float", "float", "float"),
        (("bf16+a:int8-token", "bf16+a:int8-token"), "uniform", "float", "uniform"),
    ],
)
def test_labels(schemes, label, weights, activations):
    assert classify(allocation(*schemes)) == Precision(label, weights, activations)
