"""Hooks that observe or change keys and values before a model caches them, for any architecture.

Models of transformers store them in a `Cache`, which is replaced by `mpq.network.transformers_cache`; custom models
pass them through `CachePoint` modules. Keys are seen as they are cached, after rotary embedding.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import MpqError
from mpq.core.layer import KEYS, VALUES, Layer
from mpq.network.calibration import Batch, LossFn, evaluating

Change: TypeAlias = Callable[[str, Tensor], Tensor]  # entry's name, (batch, heads, tokens, width) -> what is cached
ARGUMENTS = ("cache", "past_key_values")  # the cache's argument of `forward`, by version of transformers


class CachePoint(nn.Module):
    """A module for custom models, which pass keys or values (batch, heads, tokens, width) through it before caching."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind  # "keys" or "values"

    def forward(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors


def entry_name(index: int, kind: str) -> str:
    """The name of an attention layer's keys or values.

    >>> entry_name(3, "keys")
    'cache.3.keys'
    """
    return f"cache.{index}.{kind}"


class CacheHook:
    """A forward pre-hook that passes our cache to a model of transformers, in place of an empty one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make  # from a model's config

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call with our cache."""
        from mpq.network.transformers_cache import ChangingCache

        name = cache_argument(module)
        given = next((kwargs[other] for other in ARGUMENTS if kwargs.get(other) is not None), None)
        if isinstance(given, ChangingCache):
            return None
        if given is not None and given.get_seq_length():
            raise MpqError(
                f"the model got a {type(given).__name__} with {given.get_seq_length()} tokens that are not in its "
                "cache formats: pass no cache, or the one that the model returned"
            )
        others = {key: value for key, value in kwargs.items() if key not in ARGUMENTS}
        return args, {**others, name: self.make(module.config), "use_cache": True}


class PointHook:
    """A forward hook on a `CachePoint`."""

    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change = name, change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The changed vectors."""
        return self.change(self.name, output)


def cache_argument(module: nn.Module) -> str:
    """The argument of a module's `forward` that takes a cache of transformers; "" where it takes none."""
    if not hasattr(module, "generate") or getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return ""
    known = inspect.signature(module.forward).parameters
    return next((name for name in ARGUMENTS if name in known), "")


def hosts(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of transformers that take a cache."""
    if cache_argument(model):
        return [model]
    return [host for child in model.children() for host in hosts(child)]


def points(model: nn.Module) -> dict[str, CachePoint]:
    """The model's cache points by entry name, counted in the order of its modules."""
    by_name: dict[str, CachePoint] = {}
    counts = {KEYS: 0, VALUES: 0}
    for module in model.modules():
        if isinstance(module, CachePoint):
            by_name[entry_name(counts[module.kind], module.kind)] = module
            counts[module.kind] += 1
    return by_name


def change_cached(model: nn.Module, change: Change) -> list[RemovableHandle]:
    """Apply a function to everything that the model caches; returns the hooks, which undo this when removed."""
    return hook_hosts(model, partial(_changing_cache, change)) + [
        point.register_forward_hook(PointHook(name, change), prepend=True) for name, point in points(model).items()
    ]


def hook_hosts(model: nn.Module, make: Callable[[Any], Any]) -> list[RemovableHandle]:
    """Use `make(config)` as the cache of each transformers submodel; returns the hooks."""
    hook = CacheHook(make)
    return [host.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for host in hosts(model)]


def _changing_cache(change: Change, config: Any) -> Any:
    from mpq.network.transformers_cache import ChangingCache

    return ChangingCache(config, change)


def context_of(model: nn.Module) -> int | None:
    """The longest text in tokens that a model's config allows; None where it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "context"))
    return next((int(one) for one in lengths if one), None)


@contextmanager
def changing(model: nn.Module, change: Change) -> Iterator[None]:
    """`change_cached` inside the block."""
    handles = change_cached(model, change)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_cached(model: nn.Module, batch: Batch, loss_fn: LossFn) -> tuple[Layer, ...]:
    """Keys and values that the model caches, one entry each, from one forward pass over a sample.

    rows are heads and cols a head's width.

    Raises:
        MpqError: the model caches nothing that can be seen.
    """
    entries: dict[str, Layer] = {}

    def see(name: str, vectors: Tensor) -> Tensor:
        if vectors.ndim == 4:
            kind, heads, width = name.rpartition(".")[2], vectors.shape[1], vectors.shape[3]
            entries[name] = Layer(name, kind, heads, width, window=windows.get(name.split(".")[1], 0))
        return vectors

    windows: dict[str, int] = {}
    for host in hosts(model):
        from mpq.network.transformers_cache import windows_of

        windows |= windows_of(host.config)
    with torch.no_grad(), evaluating(model), changing(model, see):
        loss_fn(model, batch)
    if not entries:
        raise MpqError(
            f"{type(model).__name__} has no cache of keys and values: leave out the budget of a cache (memory, kv_bits)"
        )
    order = sorted(entries, key=lambda name: (int(name.split(".")[1]), name))
    return tuple(entries[name] for name in order)
