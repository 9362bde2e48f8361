"""Bytes of a model's tensors, shared ones counted once, numbers that a pass keeps, and memory given back."""

import ctypes
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn


def state_bytes(model: nn.Module, without: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors in a model's state except those of `without`; shared ones count once."""
    left_out = {_memory_key(tensor) for tensor in without}
    state = (tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor))
    tensors = {_memory_key(tensor): tensor for tensor in state}
    return sum(tensor.numel() * tensor.element_size() for place, tensor in tensors.items() if place not in left_out)


def other_bytes(model: nn.Module, layers: Iterable[Layer]) -> int:
    """Bytes of the tensors in a model's state other than the layers' weights; no scheme changes them."""
    weights: list[Tensor] = [model.get_submodule(layer.name).weight for layer in layers]  # type: ignore[misc]
    return state_bytes(model, weights)


def _memory_key(tensor: Tensor) -> tuple[Any, ...]:
    """A key equal for tensors that share memory, or, on "meta", are the same object."""
    address = tensor.untyped_storage().data_ptr()
    if not address:
        return (id(tensor),)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@torch.no_grad()
def numbers_kept(model: nn.Module, batch: Batch, loss_fn: LossFn) -> int:
    """About what a batch's graph and gradients keep: twice the outputs of all modules that have no parts."""
    numbers = 1

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal numbers
        numbers += output.numel() if isinstance(output, Tensor) else 0

    handles = [
        each.register_forward_hook(count)
        for each in model.modules()
        if not (isinstance(each, torch.jit.ScriptModule) or any(True for _ in each.children()))
    ]
    try:
        loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return 2 * numbers


def release_memory() -> None:
    """Return memory that the C library keeps for later allocations to the system, where possible (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
