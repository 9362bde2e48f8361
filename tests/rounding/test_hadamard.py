import pytest
import torch

from mpq.core.errors import MpqError
from mpq.network.calibration import seeded
from mpq.rounding.hadamard import random_rotation


@pytest.mark.parametrize(("block", "cols"), [(1, 3), (16, 48), (32, 50), (8, 5)])
def test_rotations_cancel_in_products_and_can_be_undone(block, cols):
    a, b = (torch.randn(n, cols, generator=seeded(n), dtype=torch.float64) for n in (7, 4))
    rotation = random_rotation(block, seeded(0))
    torch.testing.assert_close(rotation.rotate(a) @ rotation.rotate(b).T, a @ b.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation.undo(rotation.rotate(a), cols), a, rtol=1e-12, atol=1e-12)


def test_an_outlier_is_spread_evenly_over_its_block():
    spike = torch.zeros(1, 32)
    spike[0, 5] = 8.0
    rotated = random_rotation(16, seeded(1)).rotate(spike)
    assert rotated[0, :16].abs().tolist() == pytest.approx([2.0] * 16)
    assert rotated[0, 16:].tolist() == [0.0] * 16


def test_only_powers_of_two():
    with pytest.raises(MpqError, match="power of two"):
        random_rotation(12, seeded(0))


def test_signs_are_drawn_by_the_generator():
    signs = random_rotation(256, seeded(1)).signs
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum().item()) < 5 * 256**0.5
    assert not torch.equal(signs, random_rotation(256, seeded(2)).signs)
    assert torch.equal(signs, random_rotation(256, seeded(1)).signs)
