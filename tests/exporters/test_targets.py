import pytest

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import EXPORTERS, exporter_named
from mpq.exporters.targets import CONSUMERS, READERS, check, consumer_named, forbidden, nearest

LINEAR = Layer("a", "linear", 64, 256)
CONV = Layer("c", "conv2d", 64, 72)


def test_every_consumer_has_an_exporter_and_the_other_way_round():
    assert CONSUMERS.keys() == EXPORTERS.keys()
    assert all(callable(exporter_named(name)) for name in EXPORTERS)
    assert {consumer_named(reader).name for reader in READERS} <= CONSUMERS.keys()
    for ask in (consumer_named, exporter_named):
        with pytest.raises(MpqError, match="unknown export target 'gguff': did you mean gguf"):
            ask("gguff")


@pytest.mark.parametrize("consumer", [consumer for consumer in CONSUMERS.values() if consumer.schemes])
def test_the_well_known_schemes_can_be_held(consumer):
    assert not [name for name in consumer.schemes if consumer.objection(LINEAR, parse_scheme(name))]
    assert all(parse_scheme(name).name == name for name in consumer.schemes)
    check(consumer, Allocation((LINEAR,), (nearest(consumer, LINEAR, parse_scheme("int5-g99")),)))


@pytest.mark.parametrize(
    ("scheme", "cols", "instead"),
    [("q4_k", 640, "int5-g32"), ("q2_k", 640, "iq4_nl"), ("q6_k", 172, "fp16"), ("int4-g32", 1, "fp16")],
)
def test_llama_cpps_own_fallback_is_named(scheme, cols, instead):
    """As its quantizer does: Q4_K becomes Q5_0, Q2_K IQ4_NL, Q6_K Q8_0, and F16 where rows do not divide by 32."""
    layer = Layer("down", "linear", 1, cols)
    with pytest.raises(MpqError, match=f"cannot hold layer down in {scheme} .*{cols} .*: .* is {instead}"):
        check(CONSUMERS["gguf"], Allocation((layer,), (scheme,)))
    assert forbidden(CONSUMERS["gguf"], (layer, LINEAR), (scheme, "fp16")) == {"down": (scheme,)}


def test_searches_are_restricted_to_what_can_be_served():
    schemes = ("int4-g128", "int3-g64", "nf4-g64", "bf16")
    refused = forbidden(CONSUMERS["gptq"], (LINEAR, CONV), schemes)
    assert refused == {"a": ("nf4-g64",), "c": ("int4-g128", "int3-g64", "nf4-g64")}
    assert forbidden(CONSUMERS["mpq"], (LINEAR, CONV), schemes) == {}
    with pytest.raises(MpqError, match=r"can hold layer c in none of int4-g128 \(.*conv2d\): add (bf16|fp16)"):
        forbidden(CONSUMERS["gptq"], (CONV,), ("int4-g128",))


def test_mixes_go_to_our_checkpoint_alone():
    layer, names = Layer("l", "linear", 64, 256), ("int4-g64", "int2-g64/int4-g64@3")
    assert forbidden(CONSUMERS["mpq"], [layer], names) == {}
    for name in CONSUMERS.keys() - {"mpq", "gguf", "onnx"}:
        assert forbidden(CONSUMERS[name], [layer], names) == {"l": names[1:]}
    for name in CONSUMERS.keys() - {"mpq"}:
        with pytest.raises(MpqError, match="one format"):
            check(CONSUMERS[name], Allocation((layer,), names[1:]))
