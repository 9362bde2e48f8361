"""Fingerprints of tensors, which tell whether a file belongs to this model and data."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of types, shapes and bytes, in order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor).data)
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of its elements in order, copied only where they are not in one piece on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    # A single element is contiguous whatever its stride, and not every stride can be seen as bytes.
    bytewise: NDArray[np.uint8] = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
    return bytewise


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of all parameters, then all buffers such as batch statistics, in the model's order."""
    return fingerprint(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
