"""Random Hadamard rotations: they distribute outliers over a block and keep the product of two rotated matrices."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError


@dataclass(frozen=True, eq=False)
class Rotation:
    """diag(signs) H / sqrt(block) on every block of `block` neighbours: orthogonal, so (A R)(B R)^T = A B^T."""

    signs: Tensor  # (block,), +1 or -1

    @property
    def block(self) -> int:
        """Size of a block: neighbours that are mixed."""
        return len(self.signs)

    def rotate(self, matrix: Tensor) -> Tensor:
        """Rotate the rows, (rows, cols) to (rows, cols rounded up to whole blocks)."""
        rows, cols = matrix.shape
        blocks = functional.pad(matrix, (0, -cols % self.block)).view(rows, -1, self.block)
        return ((blocks * self.signs.to(matrix)) @ _matrix(self.block).to(matrix)).view(rows, -1)

    def undo(self, matrix: Tensor, cols: int) -> Tensor:
        """The inverse of `rotate`: (rows, whole blocks) to (rows, cols)."""
        blocks = matrix.view(len(matrix), -1, self.block) @ _matrix(self.block).to(matrix)
        return (blocks * self.signs.to(matrix)).view(len(matrix), -1)[:, :cols]


def random_rotation(block: int, generator: torch.Generator) -> Rotation:
    """A rotation with random signs.

    Raises:
        MpqError: a block size that is not a power of two.
    """
    if block < 1 or block & (block - 1):
        raise MpqError(f"invalid block size of a Hadamard rotation: expected a power of two, not {block}")
    signs = torch.randint(0, 2, (block,), generator=generator, device=generator.device) * 2 - 1
    return Rotation(signs.float())


@lru_cache(maxsize=16)
def _matrix(block: int) -> Tensor:
    matrix: Tensor = torch.from_numpy(hadamard(block)).double() / block**0.5  # symmetric: its own inverse
    return matrix
