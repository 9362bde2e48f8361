"""Texts and images as batches: windows of tokens, and samples drawn from a seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.network.calibration import seeded

Encode = Callable[[str], Sequence[int]]


def token_windows(tokens: Sequence[int] | Tensor, seqlen: int, source: str = "the text") -> Tensor:
    """Consecutive windows, (windows, seqlen), of a source's tokens; an incomplete last window is dropped.

    Raises:
        MpqError: fewer tokens than one window holds.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    if seqlen < 2:
        raise MpqError(f"invalid seqlen {seqlen}: expected at least 2 tokens, so that one is predicted")
    if len(tokens) < seqlen:
        raise MpqError(f"{source} has {len(tokens)} tokens, less than one window of {seqlen}: take a smaller seqlen")
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)


def draw(samples: int, count: int, seed: int, skip: int = 0) -> Tensor:
    """Sorted indices of `count` random samples, or of all; `skip` leaves out the first draws."""
    if count < 1:
        raise MpqError(f"invalid number of samples {count}: expected at least 1")
    return torch.randperm(samples, generator=seeded(seed, "samples"))[skip : skip + count].sort().values


def text_batches(
    text: str, encode: Encode, *, seqlen: int, batch_size: int, samples: int, seed: int, skip: int = 0
) -> tuple[Tensor, ...]:
    """Batches of token windows (batch, seqlen), drawn from the text."""
    windows = token_windows(encode(text), seqlen)
    return window_batches(windows, batch_size=batch_size, samples=samples, seed=seed, skip=skip)


def window_batches(windows: Tensor, *, batch_size: int, samples: int, seed: int, skip: int = 0) -> tuple[Tensor, ...]:
    """Batches (batch, seqlen) of chosen windows."""
    chosen = draw(len(windows), samples, seed, skip)
    return torch.split(windows[chosen], batch_size) if len(chosen) else ()


def image_batches(
    inputs: Tensor, labels: Tensor, *, batch_size: int, samples: int, seed: int, skip: int = 0
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(inputs, labels) batches of chosen images."""
    chosen = draw(len(inputs), samples, seed, skip)
    if not len(chosen):
        return ()
    return tuple(zip(torch.split(inputs[chosen], batch_size), torch.split(labels[chosen], batch_size), strict=True))
