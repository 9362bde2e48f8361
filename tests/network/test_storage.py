"""Bytes of a model's state: shared memory counts once, in any memory format."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from mpq.network.storage import release_memory, state_bytes


def test_shared_tensors_count_once_in_any_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model.append(nn.Conv2d(8, 8, 3))
    model[3].weight = model[1].weight
    plain = state_bytes(model, [model[0].weight, model[1].weight])
    assert plain == (3 * 8 + 4 * 8) * 4 + 8  # biases, the normalization's four vectors, its count of batches
    model.to(memory_format=torch.channels_last)
    assert state_bytes(model, [model[0].weight, model[1].weight]) == plain
    assert state_bytes(model) == plain + (8 * 3 * 9 + 8 * 8 * 9) * 4


def test_tensors_without_memory_are_distinguished():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert state_bytes(model) == (16 + 4 + 4) * 4


def test_two_views_of_one_storage_are_two_tensors():
    model, stack = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.zeros(8, 4)
    for layer, part in zip(model, stack.chunk(2), strict=True):
        layer.weight = nn.Parameter(part)
    assert state_bytes(model) == 2 * 16 * 4


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library gives nothing back when asked"
)
def test_freed_memory_is_returned_to_the_system():
    """Small blocks below a kept one stay in the heap when they are freed."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    release_memory()
    blocks = [torch.ones(2**13) for _ in range(4000)]  # 130 MB in pieces that are not mapped one by one
    kept = torch.ones(2**13)
    before = resident()
    del blocks
    release_memory()
    assert resident() < before - 60e6
    assert bool(kept.all())
