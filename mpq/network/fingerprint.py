"""Fingerprints of tensors, which tell whether a file belongs to this model and data."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of types, shapes and bytes, in order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of all parameters, then all buffers such as batch statistics, in the model's order."""
    return fingerprint(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
