"""Schemes parse and print; costs follow from them."""

import pytest

from mpq.core.costs import bitops, weight_bytes
from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme


@pytest.mark.parametrize(
    "name", ["int4-g128", "int8-channel+a:int8-token", "fp8-e4m3+a:fp8-e4m3", "int4-g128+a:mxfp8-e4m3"]
)
def test_names_survive(name):
    assert parse_scheme(name).name == name
    assert parse_scheme(parse_scheme(name).name) == parse_scheme(name)


@pytest.mark.parametrize("name", ["int4-g128+a:nvfp4", "int4-g128+a:int8-channel-asym", "int4-g128+a:", "+a:int8"])
def test_unsupported_activation_formats_are_refused(name):
    with pytest.raises(MpqError):
        parse_scheme(name)


def test_costs():
    """FLIQS: bf16 : e4m3 : e2m1 = 16 : 4 : 1 when weights and activations share the format."""
    costs = [bitops(parse_scheme(name), 1000) for name in ("bf16", "fp8-e4m3+a:fp8-e4m3", "mxfp4+a:mxfp4")]
    assert [cost / costs[-1] for cost in costs] == [16.0, 4.0, 1.0]
    assert weight_bytes(parse_scheme("int4-g128+a:int8-token"), 4, 256) == 4 * (128 + 4)
