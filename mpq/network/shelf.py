"""A store of tensors: in memory up to a limit, in files beyond it, which are read when a tensor is needed."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mpq.network.fingerprint import as_bytes

LIMIT = 2**27  # bytes in memory

Kept: TypeAlias = Callable[[], Tensor]  # gives the tensor


class Shelf:
    """Keeps tensors; its temporary folder is removed with the object."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held, self.written = limit, 0, 0
        self._folder: TemporaryDirectory[str] | None = None

    def keep(self, tensor: Tensor) -> Kept:
        """A function that returns the tensor, or reads an equal one from a file when the limit is reached."""
        size = tensor.numel() * tensor.element_size()
        if size == 0 or self.held + size <= self.limit:
            self.held += size
            return lambda: tensor
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="mpq-")
        path, dtype, shape = Path(self._folder.name) / str(self.written), tensor.dtype, tensor.shape
        self.written += 1
        as_bytes(tensor).tofile(path)
        return lambda: torch.from_numpy(np.fromfile(path, np.uint8)).view(dtype).view(shape)
