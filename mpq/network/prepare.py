"""Preparing a model: computed weights are stored, compiled wrappers around modules are removed."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mpq.core.errors import MpqError

COMPUTING = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # hooks that compute a weight before each call


def prepared(model: nn.Module) -> nn.Module:
    """The model itself, or a prepared copy where a weight is computed or a submodule is compiled.

    In the copy, weights computed by a parametrization, weight or spectral normalization or a pruning mask are stored
    with their values in evaluation mode, and the computation is removed. A model compiled as a whole is unwrapped.

    Raises:
        MpqError: a parameter on the device "meta" (named).
    """
    model = getattr(model, "_orig_mod", model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MpqError(f"the parameter {name} is on the device 'meta' and has no content: load the weights first")
    if not any(_is_compiled(module) or computes_weight(module) for module in model.modules()):
        return model
    for module in model.modules():
        if isinstance(vars(module).get("weight"), Tensor):  # computed by a hook: non-leaf tensors cannot be copied
            vars(module)["weight"] = vars(module)["weight"].detach()
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if _is_compiled(module):
            plain: nn.Module = module._orig_mod
            model.set_submodule(name.replace("._orig_mod", "").removeprefix("_orig_mod."), plain)
    return bake(model)


def bake(model: nn.Module) -> nn.Module:
    """Store computed weights in place; return the model."""
    for module in list(model.modules()):
        training, module.training = module.training, False  # spectral normalization would iterate in training mode
        if parametrize.is_parametrized(module, "weight"):
            _own_class(module)
            parametrize.remove_parametrizations(module, "weight")
        for hook in _hooks(module):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module)
            else:
                prune.remove(module, "weight")  # type: ignore[no-untyped-call]
        module.training = training
    return model


def _own_class(module: nn.Module) -> None:
    """Give the module its own copy of its class, which holds the parametrization and is shared with deep copies."""
    cls = type(module)
    content = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, content)


def computes_weight(module: nn.Module) -> bool:
    """Whether the module's weight is computed in a known way."""
    return parametrize.is_parametrized(module, "weight") or bool(_hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, COMPUTING)]
    return [hook for hook in hooks if "weight" in (getattr(hook, "name", ""), getattr(hook, "_tensor_name", ""))]


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules  # torch._dynamo.OptimizedModule, without a slow import
