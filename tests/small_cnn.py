"""A tiny network and images."""

import torch
from torch import Tensor, nn

from mpq.network.calibration import seeded


def small_cnn() -> nn.Module:
    """Seeded weights: (n, 3, 6, 6) -> (n, 4)."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(0, name)) * 0.5)
    return model.eval()


def images(batches: int = 2, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """(inputs, labels) batches."""
    return [
        (torch.randn((size, 3, 6, 6), generator=seeded(1, i)), torch.randint(0, 4, (size,), generator=seeded(2, i)))
        for i in range(batches)
    ]
