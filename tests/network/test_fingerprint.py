"""Fingerprints see values, types and shapes, however a tensor lies in memory."""

import pytest
import torch

from mpq.network.fingerprint import as_bytes, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_layout_in_memory_does_not_matter(dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    for view in (whole.t(), whole[1:, ::2], whole[:1, :1].expand(1, 1), whole[2, 3], whole[:0]):
        assert fingerprint([view]) == fingerprint([view.clone(memory_format=torch.contiguous_format)])
    single = torch.zeros(1, dtype=dtype).as_strided((1, 1), (64, 64))  # contiguous, as one element always is
    assert fingerprint([single]) == fingerprint([torch.zeros(1, 1, dtype=dtype)])
    assert as_bytes(whole).nbytes == 24 * dtype.itemsize


def test_values_types_and_shapes_do():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).int(), torch.ones(4)]
    assert len({fingerprint([tensor]) for tensor in tensors}) == 4
