"""Settings for graphs of derivatives: parameters, activation checkpointing, attention kernels."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from mpq.core.errors import MpqError

log = logging.getLogger(__name__)


@contextmanager
def only_gradients_of(model: nn.Module, weights: Sequence[Tensor] = ()) -> Iterator[None]:
    """Inside the block these parameters alone require gradients, and nothing is computed twice to save memory."""
    wanted = {id(weight) for weight in weights}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad(), without_checkpointing():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Inside the block `torch.utils.checkpoint` runs its functions as they are, of either kind.

    A reentrant checkpoint hides the graph inside it, so that what hooks record there gets no gradient; the other kind
    runs its function again on the way back, when hooks are gone.
    """
    kept = {
        name: getattr(checkpoint, name) for name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    }
    try:
        checkpoint.CheckpointFunction = _Plain  # type: ignore[assignment, misc]
        checkpoint._checkpoint_without_reentrant_generator = _nothing_around
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Plain:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """The function's result, with its graph."""
        return function(*args)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Attention in plain operations inside the block, for fused kernels have no second derivative; said in the log.

    Raises:
        MpqError: another operation without one.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), _NoticeAttention():
            yield
    except RuntimeError as error:
        if "not implemented" in str(error):
            raise MpqError(f"this model cannot be differentiated twice ({error}): take the metric 'fisher'") from error
        raise


class _NoticeAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            _say_plain()
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=1)
def _say_plain() -> None:
    log.info("attention runs in plain operations: its fused kernels cannot be differentiated twice")
