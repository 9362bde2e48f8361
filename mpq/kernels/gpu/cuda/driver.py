"""Loading cubins and launching kernels through the CUDA driver by ctypes, in PyTorch's own context and stream."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpq.core.errors import MpqError

# cuda.h: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and the enumerations of cuTensorMapEncodeTiled
_MOST_SHARED, _UINT16, _NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_128B, _FILL_WITH_ZEROS = 8, 1, 0, 3, 2, 0


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class TensorMap(ctypes.Structure):
    """A CUtensorMap: describes a matrix to the hardware that copies boxes of it; filled by the driver."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


def tensor_map(matrix: Tensor, box: tuple[int, int]) -> TensorMap:
    """A map of a row-major matrix of 16-bit numbers: boxes of (rows, 64 columns), 128-byte swizzle."""
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)  # the driver requires 64-byte alignment
    start = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    rows, columns = matrix.shape
    arguments = (
        ctypes.c_void_p(start), _UINT16, ctypes.c_uint32(2), ctypes.c_void_p(matrix.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * matrix.stride(0)),
        (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1),
        _NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_128B, _FILL_WITH_ZEROS,
    )  # fmt: skip
    _check(_driver().cuTensorMapEncodeTiled(*arguments), "map the inputs of")
    return TensorMap.from_buffer_copy(ctypes.string_at(start, ctypes.sizeof(TensorMap)))


@lru_cache(maxsize=256)
def function_of(cubin: bytes, name: str, device: int, shared: int = 0) -> ctypes.c_void_p:
    """A kernel of a cubin, loaded into the device's primary context (which PyTorch has made current), allowed to use
    `shared` bytes of dynamic shared memory.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # creates the context
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "load")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"find {name} in")
        if shared:
            _check(_driver().cuFuncSetAttribute(function, _MOST_SHARED, shared), "give shared memory to")
    return function


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Tensor | TensorMap | int | None],
    device: torch.device,
    shared: int = 0,
) -> None:
    """Launch a kernel on the current stream, asynchronously: tensors and None are pointers, numbers int32."""
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        _check(_driver().cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, pointers, None), "launch")


def _value(argument: Tensor | TensorMap | int | None) -> Any:
    if isinstance(argument, TensorMap):
        return argument
    if isinstance(argument, int):
        return ctypes.c_int32(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _check(result: int, what: str) -> None:
    if result:
        raise MpqError(f"the CUDA driver failed to {what} a kernel with its error {result} (cuda.h names it)")
