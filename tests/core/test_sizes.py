import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import MpqError
from mpq.core.sizes import parse_size

FACTORS = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


@given(st.integers(0, 10**6), st.sampled_from(sorted(FACTORS)))
def test_a_size_is_its_number_times_its_unit(number, unit):
    assert parse_size(f"{number}{unit}") == parse_size(f" {number}.0 {unit.lower()} ") == number * FACTORS[unit]
    assert parse_size(number) == number
    assert isinstance(parse_size(number), float)


@pytest.mark.parametrize("size", ["", "MB", "5 parsec", "-3MB", "1,5GB", "nan", "inf", math.nan, math.inf, -math.inf])
def test_invalid_sizes_are_refused(size):
    with pytest.raises(MpqError, match="invalid size"):
        parse_size(size)
