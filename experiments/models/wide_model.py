"""A network of 114 MB with data, in the form of a user's module that `mpq quantize` imports."""

import torch
from torch import Tensor, nn

WIDTH, DEPTH, CLASSES = 1536, 12, 8


def build() -> nn.Module:
    """Seeded weights: (n, WIDTH) -> (n, CLASSES)."""
    torch.manual_seed(0)
    body = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(WIDTH, CLASSES))


def load() -> list[tuple[Tensor, Tensor]]:
    """Four batches of noise with labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, WIDTH, generator=generator), torch.randint(0, CLASSES, (8,), generator=generator))
        for _ in range(4)
    ]
