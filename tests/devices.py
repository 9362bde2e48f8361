"""Helpers of GPU kernel tests: a device and Triton's compiler if requested, and poisoned memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
needs_device = pytest.mark.skipif(not COMPILED, reason="needs a CUDA device, and TRITON_INTERPRET=0")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new float memory with NaN, which exposes elements that a kernel does not write or reads too early."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
