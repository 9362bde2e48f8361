"""Verification of the CUDA C++ kernels: each is compared with the reference once on a device, in another process.

A faulty kernel may give wrong results, hang, or break its process's CUDA context, so kernels run only after they have
passed. `check` (called by tuning) runs the comparison and stores the verdict by the sources' hash, the device's name
and the compiler; `kernel_for` reads verdicts. Without a good one Triton computes, which is logged once.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mpq.core.files import write_atomically
from mpq.core.formats import Format, parse_format
from mpq.kernels.gpu.cuda import hopper, int4
from mpq.kernels.gpu.cuda.nvrtc import cache_folder, find_library
from mpq.kernels.gpu.fragments import arrange
from mpq.kernels.layout import pack
from mpq.rounding.reference import dequantize, quantize

BACKENDS: dict[str, ModuleType] = {"cuda": int4, "hopper": hopper}
PATIENCE = 180  # seconds before a hanging kernel is killed
# format, type, tokens, rows, columns, shares: sizes that are no multiples of tiles, groups and stages
CASES = [
    ("int4-g128", torch.bfloat16, 1, 256, 1024, 1), ("int4-g128", torch.float16, 16, 200, 1096, 3),
    ("int4-g64-asym", torch.bfloat16, 40, 144, 456, 2), ("int4-g32-asym", torch.float16, 64, 130, 2048, 1),
    ("int4-channel", torch.bfloat16, 130, 512, 576, 4), ("int4-channel-asym", torch.float16, 256, 70, 4096, 8),
]  # fmt: skip
_log = logging.getLogger(__name__)


def kernel_for(backend: str, format: Format, tokens: Tensor) -> ModuleType | None:
    """The kernel's module (with `product`) if it supports format and tokens and was verified on their device."""
    kernel = BACKENDS[backend]
    fits = kernel.covers(format, tokens) and kernel.runs_on(tokens.device)
    return kernel if fits and verified(backend, tokens.device) else None


@lru_cache(maxsize=64)
def verified(backend: str, device: torch.device) -> bool:
    """Whether the kernel has passed on this device; logged once if not."""
    complaint = _verdicts().get(_key(backend, device), "it was never compared with the reference here")
    if complaint:
        _log.warning(
            "the CUDA kernel %r is not used: %s; Triton computes ('mpq bench --device cuda --tune' compares it)",
            backend, complaint,
        )  # fmt: skip
    return not complaint


def check(backend: str, device: torch.device) -> str:
    """Compare the kernel with the reference in another process, at most once; "" or what is wrong with it."""
    key, known = _key(backend, device), _verdicts()
    if key not in known:
        known[key] = _try_elsewhere(backend, device)
        with write_atomically(_path()) as draft:
            draft.write_text(json.dumps(known, indent=1, sort_keys=True))
        verified.cache_clear()
    return known[key]


def complaint_about(product: Callable[..., Tensor], device: torch.device) -> str:
    """Fault of a product over fragments: "" or the first case that differs from the reference."""
    for name, dtype, count, rows, cols, shares in CASES:
        random = torch.Generator().manual_seed(rows)
        quantized = quantize(torch.randn(rows, cols, generator=random), parse_format(name))
        weight = [tensor.to(device) for tensor in arrange(pack(quantized)).tensors.values()]
        tokens = torch.randn(count, cols, generator=random).to(device, dtype)
        bias = torch.randn(rows, generator=random).to(device, dtype)
        outputs = [product(tokens, weight, bias, quantized.format, rows, shares) for _ in range(2)]
        truth = tokens.double() @ dequantize(quantized).to(device).double().T + bias.double()
        case = f"{name}, {count} x {rows} x {cols} in {dtype}"
        error = float((outputs[0].double() - truth).norm() / truth.norm())
        if not error < torch.finfo(dtype).eps:  # half of it is the rounding of the output; written so that NaN fails
            return f"its result for {case} is off by {error:.2g}"
        if not torch.equal(outputs[0], outputs[1]):
            return f"its result for {case} changes from run to run"
    return ""


def _try_elsewhere(backend: str, device: torch.device) -> str:
    command = [sys.executable, "-m", "mpq.kernels.gpu.cuda.verification", backend, str(device)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not end within {PATIENCE} s"
    last = (run.stdout.strip() or run.stderr.strip() or "no message").splitlines()[-1]
    return "" if run.returncode == 0 else f"its trial failed ({last})"


def _key(backend: str, device: torch.device) -> str:
    folder = files("mpq.kernels.gpu.cuda")
    kernel = BACKENDS[backend]
    texts = "".join((folder / name).read_text(encoding="utf-8") for name in kernel.FILES)
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no device"
    parts = (texts, name, str(torch.version.cuda), str(find_library()))
    return f"{backend}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def _path() -> Path:
    return cache_folder() / "verified.json"


def _verdicts() -> dict[str, str]:
    try:
        return dict(json.loads(_path().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    failure = complaint_about(BACKENDS[sys.argv[1]].product, torch.device(sys.argv[2]))
    if failure:
        sys.exit(failure)
