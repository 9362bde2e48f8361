"""The noise floor compares the original with itself; searches measure on parts of their data."""

from dataclasses import replace

import pytest
import torch

from mpq.measuring import Measurer
from mpq.rounding.store import RoundingStore
from mpq.sources import open_source


def test_the_noise_floor_of_16_bits_is_above_that_of_float32():
    floors = {}
    for dtype in (torch.float32, torch.bfloat16):
        source = open_source("tiny-lm", nsamples=4, evaluation_samples=4)
        source.model.to(dtype)
        before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in source.model.state_dict().items()}
        floor = Measurer(source, RoundingStore("nearest")).noise_floor("evaluation")
        assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in source.model.state_dict().items()} == before
        floors[dtype] = floor.divergence.mean()[0]
    assert abs(floors[torch.float32]) < 1e-6
    assert 1e-6 < floors[torch.bfloat16] < 1e-2


@pytest.mark.parametrize(("samples", "parts"), [(256, ("screening", "rest")), (16, ("search",))])
def test_measured_parts_make_up_the_data(samples, parts):
    source = open_source("tiny-lm", nsamples=4, evaluation_samples=4)
    source = replace(source, calibration=torch.arange(samples * 8).view(samples, 8).split(2))
    measurer = Measurer(source, RoundingStore("nearest"))
    assert measurer.searching == parts
    found = torch.cat([batch for part in parts for batch in measurer._batches(part)])
    assert torch.equal(found, torch.cat(measurer._batches("search")))
    if len(parts) == 2:
        assert 8 <= sum(map(len, measurer._batches(parts[0]))) < len(found) / 2
