"""Preparing a model: computed weights are stored, compiled wrappers are removed, tensors made ordinary ones."""

import inspect
from collections.abc import Collection
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mpq.core.errors import MpqError, expect
from mpq.network.attention import split_attention, splits
from mpq.network.copies import copied, own_class

COMPILED = "_torchdynamo_orig_callable"  # attribute of compiled functions: what was compiled
COMPUTING = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # hooks that compute a weight before each call


def prepared(model: nn.Module) -> nn.Module:
    """The model itself, or a prepared copy where a weight is computed or fused, or a submodule is compiled.

    In the copy, weights computed by a parametrization, weight or spectral normalization, a pruning mask or an
    embedding's largest norm are stored with their values in evaluation mode, and the computation is removed; parameters
    made in inference mode or with elements that share memory are replaced by ordinary ones; projections of
    nn.MultiheadAttention are layers (`mpq.network.attention`). A model compiled as a whole is unwrapped.

    Raises:
        MpqError: a parameter or buffer without content (named): on the device "meta", or of a lazy module; or sparse;
            a default device of torch other than the CPU.
    """
    expect(model, nn.Module, "a torch.nn.Module as the model")
    if (default := torch.get_default_device()).type != "cpu":
        raise MpqError(
            f"torch's default device is {default}, where new tensors would be made: call "
            "torch.set_default_device('cpu') first; the model and its data stay where they are"
        )
    model = getattr(model, "_orig_mod", model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise MpqError(f"{name} has no content yet: call the model once, so that its lazy modules know their sizes")
        if tensor.is_meta:
            raise MpqError(f"{name} is on the device 'meta' and has no content: load the weights first")
        if tensor.layout is not torch.strided:
            raise MpqError(f"{name} is a sparse tensor ({tensor.layout}): make it dense first, with to_dense()")
    if not (bakes(model) or any(_is_unusual(parameter) for parameter in model.parameters())):
        return model
    model = copied(model)
    for parameter in model.parameters():
        if _is_unusual(parameter):
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
    return bake(model)


def bakes(model: nn.Module, keep: Collection[str] = ()) -> bool:
    """Whether `bake` changes the model."""
    odd = any(_is_compiled(module) or _computes(module) for module in model.modules())
    return odd or bool(splits(model, keep))


def bake(model: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """Store computed weights, make layers of fused ones that `keep` does not name, and remove compiled wrappers, in
    place; return the model.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if "_orig_mod" in module._modules and name:
            plain: nn.Module = module._orig_mod
            model.set_submodule(name.replace("._orig_mod", "").removeprefix("_orig_mod."), plain)
    for module in list(model.modules()):
        _unwrap_forward(module)
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            _keep_norms(module)
        training, module.training = module.training, False  # spectral normalization would iterate in training mode
        names, hooks = _computed(module)
        if names:
            own_class(module)
        for name in names:
            _store(module, name)
        for hook, name in hooks:
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, name)
            else:
                prune.remove(module, name)  # type: ignore[no-untyped-call]
        module.training = training
    return split_attention(model, keep)


def _store(module: nn.Module, name: str) -> None:
    """Store a parametrized tensor; as a parameter where its originals are, also under `torch.no_grad`."""
    computation: Any = module.parametrizations[name]  # type: ignore[index]
    originals = list(computation.parameters(recurse=False))
    parametrize.remove_parametrizations(module, name)
    if originals and name in module._buffers:
        value = module._buffers.pop(name)
        trained = any(tensor.requires_grad for tensor in originals)
        module.register_parameter(name, nn.Parameter(value.detach(), trained))  # type: ignore[union-attr]


def computes_weight(module: nn.Module) -> bool:
    """Whether the module's weight is computed in a known way."""
    names, hooks = _computed(module)
    limited = isinstance(module, nn.Embedding) and module.max_norm is not None
    return limited or "weight" in (*names, *(name for _, name in hooks))


def _computes(module: nn.Module) -> bool:
    names, hooks = _computed(module)
    return bool(names or hooks) or computes_weight(module)


def _computed(module: nn.Module) -> tuple[list[str], list[tuple[Any, str]]]:
    """The module's tensors with parametrizations, and hooks that compute one with its name; none of a recurrent module,
    whose fused kernel keeps tensors of its own.
    """
    if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
        return [], []
    names = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, COMPUTING)]
    return names, [(hook, getattr(hook, "name", "") or getattr(hook, "_tensor_name", "")) for hook in hooks]


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is torch._dynamo.OptimizedModule (without a slow import), or its forward is a compiled function."""
    return "_orig_mod" in module._modules or hasattr(vars(module).get("forward"), COMPILED)


def _unwrap_forward(module: nn.Module) -> None:
    """Run the module's own forward again, where it was compiled: the compiled one stays bound to the module that it
    was compiled for, and a copy would compute with that one's weights.
    """
    compiled: Any = vars(module).get("forward")
    if hasattr(compiled, COMPILED):
        own = inspect.unwrap(compiled)
        module.forward = MethodType(own.__func__, module) if inspect.ismethod(own) else own


def _is_unusual(parameter: Tensor) -> bool:
    """Whether autograd or a write refuses the parameter: made in inference mode, or expanded over its memory."""
    return parameter.is_inference() or any(
        step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)
    )


@torch.no_grad()
def _keep_norms(embedding: nn.Embedding) -> None:
    """Store rows no longer than the largest norm, as look-ups would make them."""
    assert embedding.max_norm is not None
    rows = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    torch.embedding_renorm_(embedding.weight, rows, embedding.max_norm, embedding.norm_type)
    embedding.max_norm = None
