"""Tuning block choices, and timing products against the device's own copy bandwidth and its 16-bit product."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

import mpq.kernels.ops  # noqa: F401  (defines torch.ops.mpq)
from mpq.core.formats import Format, parse_format
from mpq.core.rounding import quantize
from mpq.kernels.cuda import int4
from mpq.kernels.fragments import FRAGMENTS
from mpq.kernels.layout import pack, to_layout
from mpq.kernels.triton.config import Config, default_config, step_cols
from mpq.kernels.triton.linear import linear, product
from mpq.kernels.triton.spec import spec_of
from mpq.kernels.triton.tables import device_facts, key_of, remember

CACHE_BYTES = 128 << 20  # weights rotate through more than any L2 holds


@dataclass(frozen=True)
class Timing:
    """One product's median time."""

    format: str
    rows: int
    cols: int
    tokens: int
    microseconds: float
    gigabytes: float  # a second, of stored weights
    of_copy: float  # share of the measured copy bandwidth
    speedup: float  # over bf16 weights


def median_seconds(runs: list[Callable[[], Tensor]], device: torch.device, repeats: int = 5) -> float:
    """Median time of one of the runs (the same work on different weights), by device events on a GPU."""
    for run in runs:
        run()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for run in runs:
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(runs))
        else:
            before = time.perf_counter()
            for run in runs:
                run()
            times.append((time.perf_counter() - before) / len(runs))
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size: int = CACHE_BYTES) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds([lambda: target.copy_(source)], device)


def weights_of(format: Format, rows: int, cols: int, device: torch.device, copies: int) -> list[list[Tensor]]:
    """Random weights in fragments."""
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    tensors = to_layout(pack(quantize(matrix, format)), FRAGMENTS).tensors.values()
    return [[tensor.to(device, copy=True) for tensor in tensors] for _ in range(copies)]


def candidates(format: Format, tokens: int, rows: int, cols: int, processors: int) -> list[Config]:
    """Blocks worth timing, the safe choice first; group scales stay on the accumulators."""
    spec = spec_of(format)
    base = default_config(spec, tokens, rows, cols, processors)
    found = [base]
    for block_k in sorted({step_cols(spec), min(64, step_cols(spec))}):
        for block_n, split, stages in ((64, 1, 4), (64, 2, 4), (64, 4, 4), (64, 8, 5), (128, 1, 3), (128, 4, 4)):
            warps = 4 if block_n == 64 else 8
            found.append(replace(base, block_n=block_n, block_k=block_k, split=split, stages=stages, warps=warps))
    found += [Config(split=split, backend="cuda") for split in (1, 2, 4, 8)]
    return list(dict.fromkeys(found))


def tune(
    name: str, rows: int, cols: int, tokens: int, device: torch.device, choices: Iterable[Config] | None = None
) -> Config:
    """Time the candidates for a product with bf16 inputs, keep the fastest in the user's table and return it."""
    format = parse_format(name)
    device_name, processors = device_facts(device)
    copies = max(1, min(16, CACHE_BYTES // format.nbytes(rows, cols))) if device.type == "cuda" else 1
    weights = weights_of(format, rows, cols, device, copies)
    inputs = torch.randn(tokens, cols, device=device).bfloat16()
    seconds: dict[Config, float] = {}
    for config in choices or candidates(format, tokens, rows, cols, processors):
        if config.backend == "cuda" and not (device.type == "cuda" and int4.covers(format, inputs)):
            continue
        seconds[config] = median_seconds([_run(inputs, weight, format, rows, config) for weight in weights], device)
    best = min(seconds, key=lambda config: seconds[config])
    remember(device_name, {key_of(format.name, "", tokens, rows, cols): best})
    return best


def _run(inputs: Tensor, weight: list[Tensor], format: Format, rows: int, config: Config) -> Callable[[], Tensor]:
    if config.backend == "cuda":
        return lambda: int4.product(inputs, weight, None, format, rows, config.split)
    return lambda: product(inputs, weight, None, format, rows, config, inputs.dtype)


def bench(
    names: Iterable[str], shapes: Iterable[tuple[int, int]], batches: Iterable[int], device: torch.device
) -> list[Timing]:
    """Time every format, shape (rows, cols) and batch; bf16 is timed right beside each."""
    bandwidth = copy_bandwidth(device, CACHE_BYTES if device.type == "cuda" else 1 << 20)
    timings, batches = [], list(batches)
    for rows, cols in shapes:
        copies = max(1, min(16, CACHE_BYTES // (2 * rows * cols))) if device.type == "cuda" else 1
        plain = [torch.randn(rows, cols, device=device).bfloat16() for _ in range(copies)]
        for name in names:
            format = parse_format(name)
            nbytes = format.nbytes(rows, cols)
            count = max(1, min(32, CACHE_BYTES // nbytes)) if device.type == "cuda" else 1
            weights = weights_of(format, rows, cols, device, count)
            for tokens in batches:
                inputs = torch.randn(tokens, cols, device=device).bfloat16()
                packed = [_linear(inputs, weight, name, rows, cols) for weight in weights]
                seconds = median_seconds(packed, device)
                base = median_seconds([_plain(inputs, matrix) for matrix in plain], device)
                rate = nbytes / seconds
                facts = (seconds * 1e6, rate / 1e9, rate / bandwidth, base / seconds)
                timings.append(Timing(name, rows, cols, tokens, *facts))
    return timings


def _linear(inputs: Tensor, weight: list[Tensor], name: str, rows: int, cols: int) -> Callable[[], Tensor]:
    return lambda: linear(inputs, weight, None, name, rows, cols, FRAGMENTS, "")


def _plain(inputs: Tensor, matrix: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.linear(inputs, matrix)
