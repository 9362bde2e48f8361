"""Second moments against the plain product."""

import pytest
import torch

from mpq.network.moments import STRIP, half_gram, whole_gram


@pytest.mark.parametrize(
    "shape", [(5, 1), (3, 7), (9, STRIP), (4, STRIP + 1), (2, 3, 2 * STRIP), (2, 3, 2 * STRIP + 5)]
)
def test_moments_in_strips_equal_the_full_product(shape):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for _ in range(3)]
    half = sum(half_gram(part) for part in parts)
    whole = whole_gram(half, shape[-1])
    expected = sum(part.double().mT @ part.double() for part in parts)
    # A float32 sum of n products: at most n roundings, each of eps times the sum of magnitudes.
    rows = 3 * shape[-2]
    bound = rows * torch.finfo(torch.float32).eps * sum(part.abs().mT @ part.abs() for part in parts)
    assert torch.all((whole - expected).abs() <= bound)
    assert torch.equal(whole, whole.mT)


def test_only_half_is_kept():
    assert half_gram(torch.ones(1, 8 * STRIP)).numel() == (8 * STRIP) ** 2 * (1 + 1 / 8) / 2
