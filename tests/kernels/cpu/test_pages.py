import pytest
import torch

from mpq.kernels.cpu.pages import LARGE, on_large_pages


@pytest.mark.parametrize("count", [0, 5, LARGE // 4, LARGE + 12345])
def test_copies_are_equal_contiguous_and_independent(count):
    tensor = torch.arange(2 * count, dtype=torch.float32).reshape(2, count)[:, : max(0, count - 1)]
    placed = on_large_pages(tensor)
    assert torch.equal(placed, tensor)
    assert placed.dtype == tensor.dtype
    assert placed.is_contiguous()
    if placed.nbytes >= LARGE:
        assert placed.data_ptr() % LARGE == 0
    placed += 1
    assert not count > 1 or not torch.equal(placed, tensor)
