"""Models larger than the device: weights are copied to it one module at a time.

A module's parameters are copied to the device when it runs and freed afterwards. Autograd saves only a reference, and
the backward pass copies the parameters again. At most one module's weights are on the device at a time; each is copied
twice.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Visitors:
    """Copies of parameters on the device: current and peak bytes."""

    device: torch.device
    resident: int = 0
    peak: int = 0
    owners: dict[int, nn.Parameter] = field(default_factory=dict)  # by the address of a copy on the device

    def fetch(self, parameter: nn.Parameter, origin: Tensor) -> Tensor:
        """Copy `origin`, the parameter's values, to the device."""
        copy = origin.to(self.device, copy=True)
        size, address = copy.numel() * copy.element_size(), copy.untyped_storage().data_ptr()
        self.resident += size
        self.peak = max(self.peak, self.resident)
        self.owners[address] = parameter
        weakref.finalize(copy.untyped_storage(), self._left, size, address)
        return copy

    def _left(self, size: int, address: int) -> None:
        self.resident -= size
        self.owners.pop(address, None)


@contextmanager
def offloaded(model: nn.Module, device: str | torch.device) -> Iterator[Visitors]:
    """Inside the block the model computes on `device`, forward and backward, while its parameters stay where they are.

    Buffers stay on the device for the whole block. Weights get no gradients; layers' outputs and inputs do.
    """
    visitors = Visitors(torch.device(device))
    origins = {parameter: parameter.data for parameter in model.parameters()}
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]
    users: dict[nn.Parameter, int] = dict.fromkeys(origins, 0)  # running modules that use the copy

    def enter(module: nn.Module, args: Any) -> None:
        for parameter in _used_parameters(module):
            if parameter not in users:  # a parameter substituted by functional_call
                continue
            if users[parameter] == 0:
                parameter.data = visitors.fetch(parameter, origins[parameter])
            users[parameter] += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for parameter in _used_parameters(module):
            if parameter not in users:
                continue
            users[parameter] -= 1
            if users[parameter] == 0:
                parameter.data = origins[parameter]

    def keep(tensor: Tensor) -> Any:
        parameter = visitors.owners.get(tensor.untyped_storage().data_ptr())
        if parameter is None:
            return tensor
        return parameter, tensor.size(), tensor.stride(), tensor.storage_offset()

    def bring(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        parameter, *form = kept
        return visitors.fetch(parameter, origins[parameter]).as_strided(*form)

    handles = []
    for module in model.modules():
        if next(iter(_used_parameters(module)), None) is not None:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        for buffer, origin in buffers:
            buffer.data = origin.to(device)
        with torch.autograd.graph.saved_tensors_hooks(keep, bring):
            yield visitors
    finally:
        for handle in handles:
            handle.remove()
        for parameter, origin in origins.items():
            parameter.data = origin
        for buffer, origin in buffers:
            buffer.data = origin


def _used_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that the module uses: its own, and those of submodules that it does not call."""
    yield from module.parameters(recurse=type(module) is nn.MultiheadAttention)
