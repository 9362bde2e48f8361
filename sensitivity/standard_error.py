"""The relative standard error of a mean, from numbers that arrive in portions."""

from math import sqrt

import torch
from torch import Tensor


def power_sums(numbers: Tensor) -> Tensor:
    """Count, sum and sum of squares of numbers, one per sample: (3,) float64, to be added up over portions."""
    numbers = numbers.double().cpu().flatten()
    return torch.stack([torch.ones_like(numbers).sum(), numbers.sum(), numbers.square().sum()])


def relative_error(sums: Tensor) -> float:
    """Standard error of the mean over the mean, from the sum of `power_sums`.

    1 for a single number, 0 when all are zero. Cancellation adds at most 1e-8 where numbers hardly differ.

    >>> sums = power_sums(torch.tensor([1.0, 2.0])) + power_sums(torch.tensor([3.0]))
    >>> round(relative_error(sums), 6)  # sqrt(1 / 3) / 2
    0.288675
    """
    count, total, squares = sums.tolist()
    if total == 0:
        return 0.0
    if count == 1:
        return 1.0
    variance = max(squares - total**2 / count, 0.0) / (count - 1)
    return float(sqrt(variance / count) * count / total)
