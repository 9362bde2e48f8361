import pytest

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import EXPORTERS, exporter_named
from mpq.exporters.consumers import CONSUMERS, READERS, check, consumer_named, forbidden, nearest

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


def test_searches_are_restricted_to_what_can_be_served():
    schemes = ("int4-g128", "int3-g64", "nf4-g64", "bf16")
    refused = forbidden(CONSUMERS["gptq"], (LINEAR, CONV), schemes)
    assert refused == {"a": ("nf4-g64",), "c": ("int4-g128", "int3-g64", "nf4-g64")}
    assert forbidden(CONSUMERS["mpq"], (LINEAR, CONV), schemes) == {}
    with pytest.raises(MpqError, match=r"can hold layer c in none of int4-g128 \(.*conv2d\): add (bf16|fp16)"):
        forbidden(CONSUMERS["gptq"], (CONV,), ("int4-g128",))
