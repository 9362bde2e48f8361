"""Distributed work: each process handles its share; sums are taken over all processes and known to each.

Nothing communicates outside of a `processes()` block, so one process of several may profile alone.
"""

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mpq.core.errors import MpqError

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

_rank: ContextVar[tuple[int, int]] = ContextVar("rank", default=(0, 1))


def launched() -> int:
    """Number of processes started by `torchrun`; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process; under `torchrun`, "cuda" means the GPU of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launched() > 1 else device


@contextmanager
def processes(device: str = "cpu") -> Iterator[None]:
    """Inside the block, the processes of `torchrun` or of an existing process group work together.

    Uses nccl on GPUs, else gloo. Collective: all processes enter with the same model, data and settings. An error ends
    its process; `torchrun` then ends the others.

    Raises:
        MpqError: torch was built without distributed.
    """
    if launched() == 1 and not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    if not distributed.is_available():
        raise MpqError("this PyTorch was built without torch.distributed: run one process, without torchrun")
    own = not distributed.is_initialized()
    if own:
        # Functions there take the current group as a default argument when they are imported. Imported inside the block
        # they would keep it alive past its end, and its threads could abort the process while Python ends.
        import_module("torch.distributed.nn.functional")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    token = _rank.set((distributed.get_rank(), distributed.get_world_size()))
    try:
        yield
    finally:
        _rank.reset(token)
        if own:
            distributed.destroy_process_group()


def rank_and_count() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return _rank.get()


def share(items: Sequence[Item], adjacent: bool = False) -> Sequence[Item]:
    """The items of this process: every n-th one, or a contiguous run when `adjacent`.

    >>> share([1, 2, 3])
    [1, 2, 3]
    """
    rank, count = rank_and_count()
    if adjacent:
        return items[len(items) * rank // count : len(items) * (rank + 1) // count]
    return items[rank::count]


def gathered(values: Mapping[Key, Any]) -> dict[Key, Any]:
    """Collective: the values of all processes by name, in the order of ranks."""
    if rank_and_count()[1] == 1:
        return dict(values)
    parts: list[Any] = [None] * rank_and_count()[1]
    distributed.all_gather_object(parts, dict(values))
    return {name: value for part in parts for name, value in part.items()}


def total(sums: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Collective: each tensor's sum over all processes, by name; missing tensors count as zero."""
    if rank_and_count()[1] == 1:
        return dict(sums)
    wire = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    totals: dict[Key, Tensor] = {}
    for key, (shape, dtype) in gathered({key: (part.shape, part.dtype) for key, part in sums.items()}).items():
        own = sums[key] if key in sums else torch.zeros(shape, dtype=dtype)
        moved = own.to(wire, copy=True).contiguous()
        distributed.all_reduce(moved)
        totals[key] = moved.to(own.device)
    return totals
