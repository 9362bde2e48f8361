"""The relative standard error of a mean, from numbers that come in portions."""

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor


@dataclass
class Spread:
    """Numbers, one per sample, and how well they fix their mean."""

    portions: list[Tensor] = field(default_factory=list)

    def add(self, numbers: Tensor) -> None:
        """Take the next samples' numbers, (samples,)."""
        self.portions.append(numbers.double().cpu())

    def relative_error(self) -> float:
        """Standard error of the mean over the mean; 1 when a single number tells nothing, 0 when all are zero."""
        numbers = torch.cat(self.portions)
        mean = numbers.mean().item()
        if mean == 0:
            return 0.0
        if len(numbers) == 1:
            return 1.0
        return numbers.std().item() / sqrt(len(numbers)) / mean
