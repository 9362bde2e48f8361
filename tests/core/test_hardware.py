"""The area of multiply-accumulate units and the roofline, against published figures and calculations by hand."""

import pytest

from mpq.core.hardware import Machine, area, mac_area
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme


def area_of(name):
    return mac_area(parse_scheme(name))


def test_integer_units_are_as_large_as_published():
    """Horowitz, ISSCC 2014, 45 nm: int8 multiply 282, int32 add 137 square micrometres; 137 / 32 a full adder."""
    assert area_of("int8-channel+a:int8-token") == pytest.approx((282 + 137) / (137 / 32), rel=0.05)


def test_units_grow_with_the_significands_and_with_exponents():
    ascending = ["int2+a:int2", "int4+a:int4", "int8+a:int8"]
    assert [area_of(name) for name in ascending] == [4 + 32, 16 + 32, 64 + 32]
    assert area_of("fp4-e2m1+a:fp4-e2m1") == 4 + 32 + 3 + 80  # two significand bits, two exponent bits, the shifter
    assert area_of("fp8-e4m3+a:fp8-e4m3") == 16 + 32 + 5 + 80
    assert area_of("bf16") == 64 + 32 + 9 + 80
    assert area_of("int4") == 4 * 8 + 32 + 9 + 80  # with bf16 activations
    assert area_of("int4") < area_of("fp16") < area_of("fp32")
    assert area(Layer("a", "linear", 4, 8, macs=10), parse_scheme("int8+a:int8")) == 960


def test_the_roofline_is_the_maximum_of_memory_and_compute_time():
    machine = Machine(bytes_per_second=100.0, macs_per_second={4: 400.0, 8: 200.0, 16: 100.0})
    few, many = Layer("a", "linear", 8, 64, macs=512), Layer("a", "linear", 8, 64, macs=512_000)
    for name, width in (("int4+a:int4", 400), ("int4+a:int8-token", 200), ("int8-channel", 100), ("int3+a:int3", 400)):
        scheme = parse_scheme(name)
        assert machine.seconds(many, scheme) == 512_000 / width
        assert machine.seconds(few, scheme) == max(scheme.weight.nbytes(8, 64) / 100, 512 / width)
    assert machine.seconds(few, parse_scheme("fp32")) == 2048 / 100


def test_area_and_time_of_mixes_and_codebooks():
    """A mix multiplies in its widest format; nf4 is a float of 4 significant bits and an exponent of 1."""
    assert area_of("int2-g32/int8-g32@4+a:int8-token") == area_of("int8-g32+a:int8-token") == 64 + 32
    assert area_of("nf4-g64") == 4 * 8 + 32 + 9 + 80
    assert area_of("nf4-g64+a:nf4-channel") == 4 * 4 + 32 + 2 + 80
    assert area_of("fp16+a:fp16") == 11 * 11 + 32 + 6 + 80
    assert [area_of(name) for name in ("fp16", "fp32")] == [11 * 8 + 32 + 9 + 80, 24 * 8 + 32 + 9 + 80]
    machine = Machine(bytes_per_second=1e9, macs_per_second={4: 400.0, 8: 200.0, 16: 100.0})
    layer = Layer("a", "linear", 64, 64, macs=4000)
    assert machine.seconds(layer, parse_scheme("int2-g32/int8-g32@4+a:int4-token")) == 20
    assert machine.seconds(layer, parse_scheme("fp32")) == 40  # the widest that is known


def test_default_machine_doubles_throughput_at_half_width():
    layer = Layer("a", "linear", 1, 1, macs=10**6)
    names = ("int4+a:int4", "int5+a:int5", "int8-channel+a:int8-token", "bf16", "fp32")
    assert [Machine().seconds(layer, parse_scheme(name)) for name in names] == [2.5e-9, 5e-9, 5e-9, 1e-8, 2e-8]
    assert Machine().seconds(Layer("a", "linear", 10, 10), parse_scheme("bf16")) == 2e-10
