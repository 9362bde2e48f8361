"""A layer's call as hooks see it: its input comes by position, `layer(x)`, or by name, `layer(input=x)`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument, or without any by position the first tensor given by name."""
    inputs: Tensor = args[0] if args else kwargs[_name(kwargs)]
    return inputs


def with_call_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another input, as a forward pre-hook registered with `with_kwargs=True` returns it."""
    if args:
        return (inputs, *args[1:]), dict(kwargs)
    return args, {**kwargs, _name(kwargs): inputs}


def _name(kwargs: Mapping[str, Any]) -> str:
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))
