"""What this machine takes for each scheme, shape and batch: read bandwidth, microseconds, the latency table."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from mpq.core.calibration import seeded
from mpq.core.latency import Latency, LatencyTable
from mpq.core.rounding import quantize
from mpq.core.scheme import Scheme, parse_scheme
from mpq.kernels import cpu
from mpq.kernels.layout import best_layout, pack, to_layout

BEYOND = 256 * 2**20  # bytes of weights that are read in turn, more than a core's share of the cache


@dataclass(frozen=True)
class Timing:
    """Medians of one interleaved run, in seconds."""

    scheme: str
    rows: int
    cols: int
    batch: int
    seconds: float
    fastest: float
    nbytes: int  # stored bytes of the weight
    bandwidth: float  # bytes per second that reading alone reached in the same run
    float32: float
    bfloat16: float

    @property
    def roof(self) -> float:
        """Stored bytes per second, as a fraction of the read bandwidth."""
        return self.nbytes / self.seconds / self.bandwidth

    @property
    def latency(self) -> Latency:
        """The entry of the latency table."""
        return Latency(self.scheme, self.rows, self.cols, self.batch, self.seconds)


def measure(
    schemes: Sequence[str],
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 30,
    beyond: int = BEYOND,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Timing]:
    """Time each scheme against reading and PyTorch's float32 and bfloat16, taking turns within one run.

    Weights rotate through copies that fill `beyond` bytes, so that none is still in the cache.

    Raises:
        MpqError: an unknown scheme.
    """
    parsed = [parse_scheme(name) for name in schemes]
    # Read in pieces as short as a layer: a longer run would meet the scheduler where layers do not.
    pages = _rotation([torch.ones(2**21)], beyond)
    for rows, cols in shapes:
        dense = torch.randn((rows, cols), generator=seeded(0, "bench", rows, cols))
        floats = {kind: _rotation([dense.to(kind)], beyond) for kind in (torch.float32, torch.bfloat16)}
        for scheme in parsed:
            packed_rows, nbytes = _packed(dense, scheme, beyond)
            for batch in batches:
                x = torch.randn((batch, cols), generator=seeded(1, batch)).to(dtype)
                contestants: list[Callable[[], object]] = [
                    partial(packed_rows, x),
                    *(partial(_dense, x.to(kind), weights) for kind, weights in floats.items()),
                    lambda: cpu.read(pages()[0]),
                ]
                ours, single, half, read = _interleaved(contestants, repeats)
                yield Timing(
                    scheme.name, rows, cols, batch, statistics.median(ours), min(ours), nbytes,
                    2**23 / statistics.median(read), statistics.median(single), statistics.median(half),
                )  # fmt: skip


def _dense(x: Tensor, following: Callable[[], list[Tensor]]) -> Tensor:
    return torch.nn.functional.linear(x, following()[0])


def latency_table(timings: Sequence[Timing]) -> LatencyTable:
    """Timings as the table that searches take."""
    facts = {"threads": torch.get_num_threads(), "instructions": cpu.level_name()}
    if timings:
        facts["bandwidth"] = statistics.median(timing.bandwidth for timing in timings)
    return LatencyTable(tuple(timing.latency for timing in timings), facts)


def _packed(dense: Tensor, scheme: Scheme, beyond: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function that multiplies by the next copy of the weight, and the weight's stored bytes."""
    packed = pack(quantize(dense, scheme.weight))
    arranged = to_layout(packed, best_layout(packed, dense.device))
    facts = (scheme.weight.name, *packed.shape, arranged.layout)
    activation = "" if scheme.activation is None else scheme.activation.name
    following = _rotation(list(arranged.tensors.values()), beyond)
    return lambda x: torch.ops.mpq.linear(x, following(), None, *facts, activation), packed.nbytes


def _rotation(tensors: list[Tensor], beyond: int) -> Callable[[], list[Tensor]]:
    copies = max(2, beyond // max(1, sum(tensor.nbytes for tensor in tensors)))
    kept = [[tensor.clone() for tensor in tensors] for _ in range(copies)]
    turn = count()
    return lambda: kept[next(turn) % copies]


def _interleaved(contestants: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats + 1):
        for run, found in zip(contestants, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [found[1:] for found in times]  # the first turn warms up
