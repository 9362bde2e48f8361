"""Loading cubins and launching kernels through the CUDA driver by ctypes, in PyTorch's own context and stream."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.errors import MpqError


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(maxsize=256)
def function_of(cubin: bytes, name: str, device: int) -> ctypes.c_void_p:
    """A kernel of a cubin, loaded into the device's primary context (which PyTorch has made current)."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "load")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    return function


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Tensor | int | None],
    device: torch.device,
) -> None:
    """Put a kernel on the current stream: tensors and None go as pointers, numbers as int32; waits for nothing."""
    values = [
        ctypes.c_int32(argument)
        if isinstance(argument, int)
        else ctypes.c_void_p(None if argument is None else argument.data_ptr())
        for argument in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        _check(_driver().cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, pointers, None), "launch")


def _check(result: int, what: str) -> None:
    if result:
        raise MpqError(f"the CUDA driver failed to {what} a kernel with its error {result} (cuda.h names it)")
