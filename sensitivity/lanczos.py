"""Lanczos' tridiagonal form of a symmetric operator, one product at a time."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
EXHAUSTED = 1e-6  # a remainder below this share of the operator's scale is float32 rounding, not a direction


class Lanczos:
    """Krylov space of an operator, grown from a start vector; every new direction is made orthogonal to all before.

    >>> operator = torch.diag(torch.tensor([3.0, 1.0, -1.0]))
    >>> run = Lanczos(torch.ones(3))
    >>> while not run.exhausted:
    ...     run.take(operator @ run.direction)
    >>> run.ritz()[0].round(4).tolist()
    [-1.0, 1.0, 3.0]
    """

    def __init__(self, start: Tensor) -> None:
        self.basis: list[Tensor] = [start / start.norm()]
        self.diagonal: list[float] = []
        self.beside: list[float] = []  # the last one is the remainder's length
        self.exhausted = False

    @property
    def direction(self) -> Tensor:
        """The unit vector whose product comes next, in the start vector's shape."""
        return self.basis[-1]

    def take(self, product: Tensor) -> None:
        """Grow the space by the operator's product with `direction`."""
        remainder = product
        for again in (False, True):  # a second pass takes away what rounding left in the first
            for known in reversed(self.basis):
                share = (known * remainder).sum(dtype=torch.float64).item()
                remainder = remainder - share * known
                if known is self.basis[-1] and not again:
                    self.diagonal.append(share)
        length = remainder.norm().item()
        self.beside.append(length)
        scale = max(map(abs, [*self.diagonal, *self.beside]))
        self.exhausted = length <= EXHAUSTED * scale or len(self.basis) == remainder.numel()
        if not self.exhausted:
            self.basis.append(remainder / length)

    def ritz(self) -> tuple[Array, Array, Array]:
        """Approximate eigenvalues in ascending order, the start vector's squared share in each, and residual norms.

        An eigenvalue of the operator lies within the residual's norm of each.
        """
        off = self.beside[: len(self.diagonal) - 1]
        values, vectors = np.linalg.eigh(np.diag(self.diagonal) + np.diag(off, 1) + np.diag(off, -1))
        return values, vectors[0] ** 2, abs(vectors[-1]) * self.beside[-1]
