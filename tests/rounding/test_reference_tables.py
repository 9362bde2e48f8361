"""Tables of scales and zero points against loops over groups; rows put together and taken apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mixes import random_mix

from mpq.core.formats import parse_format
from mpq.core.grids import float_grid
from mpq.network.calibration import seeded
from mpq.rounding.codes import encode
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import absmax_scales, dequantize, fake_quantize, quantize, stacked


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def test_zero_points_are_those_of_a_loop_over_groups():
    weight, format = normal(6, 20), parse_format("int4-g8-asym-sfp32")
    weight[1, :8] = weight[1, :8].abs() + 1  # all above zero
    weight[2, 8:16] = -weight[2, 8:16].abs() - 1
    weight[3] = 0
    scales, zeros = absmax_scales(weight, format)
    for row in range(6):
        for group in range(3):
            part = weight[row, 8 * group : 8 * group + 8].numpy()
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = (high - low) / 15 or 1.0
            assert scales[row, group].item() == pytest.approx(scale, rel=1e-6)
            assert zeros[row, group].item() == np.clip(np.round(-low / scale), 0, 15)
    error = (fake_quantize(weight, format) - weight).abs()
    assert (error <= 0.5 * (1 + 1e-5) * scales.repeat_interleave(8, 1)[:, :20] + 1e-6).all()


def test_powers_of_two_are_the_floor_and_one_for_zeros():
    """OCP MX 1.0, section 6.3: 2**(floor(log2(absmax)) - 2) for e2m1, whose largest number is 6."""
    weight = torch.zeros(2, 96)
    weight[0, 3], weight[0, 40], weight[1, 70] = 7.9, -0.3, 4.0
    scales, zeros = absmax_scales(weight, parse_format("mxfp4"))
    assert scales.tolist() == [[1.0, 2.0**-4, 1.0], [1.0, 1.0, 1.0]]
    assert zeros is None
    assert torch.equal(absmax_scales(weight * 4, parse_format("mxfp4"))[0][0], torch.tensor([4.0, 0.25, 1.0]))


def test_numbers_that_round_to_zero_have_the_positive_code():
    codes = encode(torch.tensor([-1e-9, -0.2, -0.0, 0.0, 0.2, -0.3]), float_grid(2, 1))
    assert codes.tolist() == [0, 0, 0, 0, 0, 0b1001]


@pytest.mark.parametrize("name", ["nvfp4", "int4-g32-asym", "q4_k", "int8-channel", "mxfp4"])
def test_rows_put_together_are_the_rows(name):
    whole = quantize(normal(12, 64), parse_format(name))

    def rows(start, end):
        part = replace(whole, shape=(end - start, 64), codes=whole.codes[start:end])
        return part.map_tables(lambda _, table: table[start:end] if table.ndim else table)

    parts = [rows(*ends) for ends in ((0, 3), (3, 4), (4, 12))]
    again = stacked(parts)
    assert torch.equal(again.codes, whole.codes)
    assert again.shape == whole.shape
    tables = again.tables()
    assert tables.keys() == whole.tables().keys()
    assert all(torch.equal(tables[key], table) for key, table in whole.tables().items())
    assert stacked(parts[:1]) is parts[0]


def test_each_row_of_a_mix_is_in_its_own_format():
    mix = random_mix(("int2-g4", "int3-g4", "int4-g4"), 10, 16)
    weight = normal(10, 16)
    wholes = [quantize(weight, format) for format in mix.formats]
    found, places = mixed(mix, wholes), mix.assigned(10, 16)
    assert len(set(places.tolist())) > 1
    values = dequantize(found)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(values[row], dequantize(wholes[place])[row])
    for part, rows in zip(found.parts, found.part_rows(), strict=True):
        assert rows.tolist() == [row for row, place in enumerate(places) if mix.formats[place] == part.format]
