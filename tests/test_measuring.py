"""The noise floor is the original against itself, in float32 where it is stored in 16 bits; it stays as it was."""

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
