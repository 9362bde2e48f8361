"""Timing contestants that take turns within one run, on a CPU or on a CUDA device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

CALLS = 20  # at least so many calls between two device events: their own cost and the launch of a graph are spread


class Rotation:
    """Copies of some tensors that fill `beyond` bytes, given out in turn: what comes next is in no cache.

    `copy` places them: on the memory that the real ones would be on.
    """

    def __init__(self, tensors: Sequence[Tensor], beyond: int, copy: Callable[[Tensor], Tensor] = torch.clone) -> None:
        copies = max(2, beyond // max(1, sum(tensor.nbytes for tensor in tensors)))
        self._kept = [[copy(tensor) for tensor in tensors] for _ in range(copies)]
        self._turn = count()

    def __call__(self) -> list[Tensor]:
        """The next copy."""
        return self._kept[next(self._turn) % len(self._kept)]

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class Contestant:
    """One call of the thing to time; `period` calls in a row meet every copy that it rotates through."""

    run: Callable[[], object]
    period: int = 1


@torch.inference_mode()
def interleaved(contestants: Sequence[Contestant], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each contestant's calls, `repeats` of them, all contestants once in every turn, in inference mode.

    On a CUDA device a turn is a graph of some calls, replayed between two events, and counts as their mean.
    """
    if device.type != "cuda":
        return _in_turns([one.run for one in contestants], repeats, _seconds)
    with torch.cuda.device(device):
        times = _in_turns([_replays(one) for one in contestants], repeats, _seconds_on_device)
    return [[second / _calls(one) for second in found] for one, found in zip(contestants, times, strict=True)]


def _in_turns(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[Callable[[], object]], float]
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, found in zip(runs, times, strict=True):
            found.append(clock(run))
    return [found[1:] for found in times]  # the first turn warms up


def _seconds(run: Callable[[], object]) -> float:
    run()  # as in a model, where layer follows layer: threads are awake, the code is in the cache
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_device(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _calls(contestant: Contestant) -> int:
    return contestant.period * -(-CALLS // contestant.period)


def _replays(contestant: Contestant) -> Callable[[], None]:
    """A graph of the calls, so that nothing of the host is timed."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles, does so before the capture
        for _ in range(contestant.period):
            contestant.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_calls(contestant)):
            contestant.run()
    return graph.replay
