"""Copies of models that share nothing with the original but what they are told to."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpq.core.errors import MpqError, first_line


def copied(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, which may hold tensors of a graph, such as outputs kept from its last call.

    Parametrized modules of the copy have classes of their own: a class holds which of its weights are computed.

    Args:
        model: what is copied; it stays as it is.
        shared: what stands in the copy in place of an object, by the object's id.

    Raises:
        MpqError: the model holds something that cannot be copied, such as a lock or an open file.
    """
    memo = dict(shared or {})
    for module in model.modules():
        _detach(vars(module), memo)
    try:
        made = copy.deepcopy(model, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything that the model holds may refuse, in every way
        reason = first_line(error)
        raise MpqError(f"{type(model).__name__} cannot be copied ({reason}): keep such parts outside of it") from error
    for module in made.modules():
        if not isinstance(module, torch.jit.ScriptModule) and parametrize.is_parametrized(module):
            own_class(module)
    return made


def own_class(module: nn.Module) -> None:
    """Give the module its own copy of its class, which holds the parametrizations and is shared with deep copies."""
    cls = type(module)
    content = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, content)


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Note detached copies of tensors of a graph, which `copy.deepcopy` refuses."""
    if isinstance(value, Tensor):
        if not value.is_leaf and id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, (list, tuple)):
        for part in value:
            _detach(part, memo)
    elif isinstance(value, dict):
        for part in list(value.values()):
            _detach(part, memo)
