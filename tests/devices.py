"""What tests of GPU kernels need: a device and Triton's compiler where they are asked for, and poisoned memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
needs_device = pytest.mark.skipif(not COMPILED, reason="needs a CUDA device, and TRITON_INTERPRET=0")


@contextmanager
def poisoned() -> Iterator[None]:
    """New float memory holds NaN: what a kernel does not write, or reads before writing, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
