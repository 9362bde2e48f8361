"""A store of tensors: in memory up to a limit, in memory-mapped files beyond it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

LIMIT = 2**30  # bytes in memory


class Shelf:
    """Keeps tensors; its temporary folder is removed with the object."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held, self.written = limit, 0, 0
        self._folder: TemporaryDirectory[str] | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or an equal one in a file when the limit is reached."""
        size = tensor.numel() * tensor.element_size()
        if size == 0 or self.held + size <= self.limit:
            self.held += size
            return tensor
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="mpq-")
        path = Path(self._folder.name) / str(self.written)
        self.written += 1
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape)
