"""Inputs of a layer's call as hooks see them: by position, `layer(x)`, or by name, `layer(input=x)`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first positional argument, else the first tensor given by name."""
    inputs: Tensor = args[0] if args else kwargs[_name(kwargs)]
    return inputs


def with_call_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with another input, as returned by a forward pre-hook with `with_kwargs=True`."""
    if args:
        return (inputs, *args[1:]), dict(kwargs)
    return args, {**kwargs, _name(kwargs): inputs}


def _name(kwargs: Mapping[str, Any]) -> str:
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))
