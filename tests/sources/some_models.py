"""Factories and loaders as a user would write them."""

import torch
from torch import nn
from torch.nn import functional

from mpq.network.calibration import seeded


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def not_a_model() -> str:
    return "weights"


def labelled():
    return [(torch.randn(4, 12, generator=seeded(0, i)), torch.arange(4) % 3) for i in range(5)]


def with_loss():
    batches = [torch.randn(4, 12, generator=seeded(0, i)) for i in range(3)]
    return {
        "calibration": batches[:2],
        "evaluation": batches[2:],
        "loss_fn": lambda model, batch: functional.mse_loss(model(batch), torch.zeros(len(batch), 3)),
    }


def unexplained():
    return [torch.randn(4, 12) for _ in range(3)]
