"""Memory and time of the whole job, forecast before it starts.

Each stage has its peak; what is counted dominates: copies of the model, second moments, the graph of one pass and the
logits of a vocabulary (experiments/benchmarks/bench_forecast.py compares forecasts with whole jobs).
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from tqdm import tqdm

from mpq.acceptance import FINALISTS, ROUNDS
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.evaluation import DIVERGE
from mpq.measuring import SEARCHED
from mpq.network.calibration import Batch, evaluating, outputs_of, samples_in, take, tensors_in
from mpq.network.shelf import LIMIT
from mpq.network.storage import numbers_kept, release_memory, state_bytes
from mpq.rounding import METHODS
from mpq.sensitivity.backward import GRAPH
from mpq.sensitivity.kl_curvature import POSITIONS
from mpq.sources import Source
from mpq.training.tuned_scales import Tuning

log = logging.getLogger(__name__)

FLOAT = 4  # bytes
LOGITS = 6  # copies of logits at once: log-probabilities, gradients, the original's
WEIGHTS = 8  # copies of the largest weight that is being rounded: scales, codes, errors
BACKWARD = 5  # passes that a gradient costs, products of inputs and gradients included
TEACHING = 5  # passes that a sample of a tuning step costs
MEASURED = 10  # allocations that a search measures besides its rounds, and that the comparison does
ROUNDED = 2.5e6  # weights that a thread rounds in a second, of one format, by GPTQ (one core with AVX-512)
FASTER = 4  # times as many by methods without second moments


@dataclass(frozen=True)
class Forecast:
    """Peak memory of each stage in bytes, and seconds of the whole job."""

    profiling: int
    measuring: int
    tuning: int  # 0 without tuning
    seconds: float

    @property
    def memory(self) -> int:
        """The largest peak."""
        return max(self.profiling, self.measuring, self.tuning)

    def sentence(self) -> str:
        """Both, in words.

        >>> Forecast(2 * 10**9, 10**9, 0, 700.0).sentence()
        'The job takes about 2.0 GB of memory and 12 minutes.'
        """
        minutes = math.ceil(self.seconds / 60)
        long = f"{minutes} minutes" if minutes > 1 else "a minute"
        return f"The job takes about {self.memory / 1e9:.1f} GB of memory and {long}."

    def announce(self, ram: float | None, progress: bool = True) -> None:
        """Say what the job takes, and warn where it is more than the free memory.

        Raises:
            MpqError: more than `ram` bytes, with what to lower.
        """
        if ram is not None and self.memory > ram:
            raise MpqError(f"{self._excess(ram)}, or allow more (ram)")
        if progress:
            tqdm.write(self.sentence(), sys.stderr)
        if self.memory > (free := available()):
            log.warning("%s", self._excess(free))

    def _excess(self, limit: float) -> str:
        tuned = self.tuning > limit >= max(self.profiling, self.measuring)
        return (
            f"the job takes about {self.memory / 1e9:.1f} GB of memory (profile {self.profiling / 1e9:.1f}, measuring "
            f"{self.measuring / 1e9:.1f}, tuning {self.tuning / 1e9:.1f}), more than {limit / 1e9:.1f}: "
            f"{'take 0 tuning steps' if tuned else 'shorten the samples (seqlen)'}"
        )


def forecast(
    source: Source, layers: Sequence[Layer], formats: int, method: str, effort: str, tuning: Tuning
) -> Forecast:
    """The forecast for a source, of which a batch is run.

    Args:
        source: model and data.
        layers: those to quantize.
        formats: number of candidates to profile, 0 where the table is given.
        method: rounding method.
        effort: as of `mpq.acceptance.accept`.
        tuning: of scales, where the model has logits.
    """
    batch = source.calibration[0]
    graph, seconds, logits = _pass(source, batch)
    weights = sum(layer.params for layer in layers)
    squares = FLOAT * sum(layer.cols**2 for layer in layers)
    moments = squares if METHODS.named(method).second_moment else 0
    steps = tuning.steps if logits else 0

    held = _held()
    shelved = min(LIMIT, weights * formats + moments), min(LIMIT, logits * len(source.calibration))
    rounding = shelved[0] + WEIGHTS * FLOAT * max(layer.params for layer in layers)
    profiling = squares // 2 + max(graph + LOGITS * logits, moments + squares // 2, moments + rounding)
    measuring = state_bytes(source.model) + sum(shelved) + LOGITS * logits
    teaching = measuring + 2 * FLOAT * weights + graph

    done = _samples(source, moments > 0, effort, formats > 0) + TEACHING * steps * tuning.samples
    rate = ROUNDED * torch.get_num_threads() * (1 if moments else FASTER)
    return Forecast(
        held + (profiling if formats else 0), held + measuring, held + teaching if steps else 0,
        done * seconds + weights * formats / rate,
    )  # fmt: skip


def available() -> int:
    """Bytes that this process may use: its own, and what is free."""
    return _held() + int(psutil.virtual_memory().available)


def _held() -> int:
    release_memory()
    return int(psutil.Process().memory_info().rss)


def _pass(source: Source, batch: Batch) -> tuple[int, float, int]:
    """Bytes of the graph of one piece of the data, seconds of a sample's forward pass, bytes of a batch's logits.

    Other programs do not count: on a CPU seconds are of its own threads.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_in(batch))
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    with evaluating(source.model), torch.no_grad():
        one = numbers_kept(source.model, take(batch, slice(0, 1)), source.loss_fn)
        graph = FLOAT * max(one, min(GRAPH, one * samples_in(batch)))
        times = []
        for _ in range(2):  # the faster one counts
            started = clock()
            with outputs_of(source.model) as outputs:
                source.loss_fn(source.model, batch)
            times.append(clock() - started)
    logits = sum(FLOAT * each.numel() for each in outputs) if source.kind in DIVERGE else 0
    return graph, min(times) / threads / samples_in(batch), logits


def _samples(source: Source, with_moments: bool, effort: str, profiled: bool) -> float:
    """Samples that pass through the model forwards, tuning left out; a gradient counts as several."""
    calibration, acceptance, evaluation = (
        sum(map(samples_in, part)) for part in (source.calibration, source.acceptance, source.evaluation)
    )
    scored = calibration
    if source.kind == "perplexity":
        scored = min(scored, math.ceil(POSITIONS / max(tensors_in(source.calibration[0])[0].shape[-1], 1)))
    profiling = BACKWARD * scored + with_moments * calibration if profiled else 0
    searching = (MEASURED + ROUNDS[effort]) * SEARCHED * calibration if ROUNDS[effort] else 0
    return profiling + searching + 2 * FINALISTS * (acceptance or calibration) + MEASURED * evaluation
