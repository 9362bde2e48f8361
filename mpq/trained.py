"""Export of a trainable simulation: its numbers are not rounded again."""

from typing import Any

from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.network.cached import CacheHook, PointHook
from mpq.network.prepare import prepared
from mpq.quantized import InputRounding, checked_layers, rounding_of
from mpq.rounding.reference import Quantized
from mpq.rounding.store import Finished, Rounder


def is_simulation(model: nn.Module) -> bool:
    """Whether this is a trainable simulation, or holds one."""
    return any(rounding_of(module) is not None for module in model.modules())


def as_trained(model: nn.Module, allocation: Allocation, otherwise: Rounder) -> tuple[nn.Module, Rounder]:
    """A trainable simulation for exporters: a plain model, and a rounder that returns its rounded weights.

    Args:
        model: a simulation; left as it is.
        allocation: that it was made with.
        otherwise: rounds layers that were not simulated.

    Raises:
        MpqError: a layer that the allocation lacks or has in another scheme than it was trained in.
    """
    roundings = {name: one for name, module in model.named_modules() if (one := rounding_of(module)) is not None}
    rounded: dict[str, Quantized] = {}
    methods: dict[str, None] = {}
    for layer, scheme in checked_layers(model, allocation):
        rounding = roundings.pop(layer.name, None)
        for alias in layer.aliases:
            roundings.pop(alias, None)
        if rounding is None:
            continue
        if rounding.rounding.format != scheme.weight:
            raise MpqError(
                f"layer {layer.name} was trained in {rounding.rounding.format.name}, the allocation has "
                f"{scheme.weight.name}: export with the allocation that the model was simulated in"
            )
        rounded[layer.name] = rounding.quantized(_latent(model.get_submodule(layer.name)))
        methods[rounding.method] = None
    for name, rounding in roundings.items():
        raise MpqError(f"layer {name} was trained in {rounding.rounding.format.name}, but the allocation leaves it out")
    plain = prepared(model)
    for module in plain.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, InputRounding | CacheHook):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, PointHook):
                del module._forward_hooks[key]
    return plain, Finished(f"{', '.join(methods)}, trained", rounded, otherwise)


def _latent(module: nn.Module) -> Tensor:
    """The weight before the module's WeightRounding, its only parametrization."""
    parametrizations: Any = module.parametrizations
    original: Tensor = parametrizations["weight"].original
    return original
