"""What tests of a GPU need: a device, and Triton's compiler in place of the interpreter that runs everywhere else."""

import os

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
needs_device = pytest.mark.skipif(not COMPILED, reason="needs a CUDA device, and TRITON_INTERPRET=0")
