"""Interleaved timing of contestants within one run, on a CPU or a CUDA device."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch import Tensor

Timed = TypeVar("Timed")
CALLS = 20  # least calls between two device events, to amortize the events and the graph launch


def copies(
    tensors: Sequence[Tensor], beyond: int, copy: Callable[[Tensor], Tensor] = torch.clone
) -> list[list[Tensor]]:
    """Copies of some tensors that fill `beyond` bytes: cycling through the copies defeats the cache.

    `copy` allocates them as the real tensors are allocated.
    """
    count = max(2, beyond // max(1, sum(tensor.nbytes for tensor in tensors)))
    return [[copy(tensor) for tensor in tensors] for _ in range(count)]


@dataclass(frozen=True)
class Contestant:
    """Calls to time in turn, one for each copy of the data they read.

    Use functools.partial rather than Python functions, whose code is slow to run after weights evicted it from the
    caches.
    """

    calls: Sequence[Callable[[], object]]


@torch.inference_mode()
def interleaved(contestants: Sequence[Contestant], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each contestant's calls, `repeats` of each, interleaved turn by turn, in inference mode.

    On a CUDA device a turn replays a graph of several calls between two events, and counts as their mean.
    """
    if device.type != "cuda":
        return _in_turns([cycle(one.calls) for one in contestants], repeats, _seconds)
    with torch.cuda.device(device):
        times = _in_turns([_replays(one) for one in contestants], repeats, _seconds_on_device)
    return [[second / _calls(one) for second in seconds] for one, seconds in zip(contestants, times, strict=True)]


def _in_turns(timed: Sequence[Timed], repeats: int, clock: Callable[[Timed], float]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats + 1):
        for one, seconds in zip(timed, times, strict=True):
            seconds.append(clock(one))
    return [seconds[1:] for seconds in times]  # the first turn warms up


def _seconds(calls: Iterator[Callable[[], object]]) -> float:
    next(calls)()  # wake the threads, as a model's preceding layer does
    call = next(calls)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_device(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _calls(contestant: Contestant) -> int:
    return len(contestant.calls) * -(-CALLS // len(contestant.calls))


def _replays(contestant: Contestant) -> Callable[[], None]:
    """A CUDA graph of the calls, so that host time is excluded."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile before the capture
        for call in contestant.calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(contestant.calls), _calls(contestant)):
            call()
    return graph.replay
