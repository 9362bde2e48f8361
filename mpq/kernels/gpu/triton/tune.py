"""Tuning of block sizes: times candidates of a product and stores the fastest in the user's table."""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import mpq.kernels.ops  # noqa: F401  (defines torch.ops.mpq)
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.scheme import parse_scheme
from mpq.kernels.clock import Contestant, copies, interleaved
from mpq.kernels.gpu.cuda.verification import BACKENDS, check
from mpq.kernels.gpu.fragments import FRAGMENTS, covers
from mpq.kernels.gpu.triton.config import Config, default_config, step_cols
from mpq.kernels.gpu.triton.linear import compute
from mpq.kernels.gpu.triton.spec import spec_of
from mpq.kernels.gpu.triton.tables import device_facts, key_of, remember
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import quantize

BEYOND = 128 << 20  # bytes of weights to cycle through: larger than any L2 cache
REPEATS = 5


def candidates(format: Format, tokens: int, rows: int, cols: int, processors: int) -> list[Config]:
    """Candidate block sizes, the default first; all keep group scales on the accumulators."""
    spec = spec_of(format)
    base = default_config(spec, tokens, rows, cols, processors)
    configs = [base]
    for block_k in sorted({step_cols(spec), min(64, step_cols(spec))}):
        for block_n, split, stages in ((64, 1, 4), (64, 2, 4), (64, 4, 4), (64, 8, 5), (128, 1, 3), (128, 4, 4)):
            warps = 4 if block_n == 64 else 8
            configs.append(replace(base, block_n=block_n, block_k=block_k, split=split, stages=stages, warps=warps))
        if tokens > 16:
            configs += [
                replace(configs[-1], block_n=block_n, split=1, warps=warps, stages=stages, programs=times * processors)
                for block_n, warps, stages, times in ((64, 4, 4, 1), (64, 4, 4, 2), (128, 8, 3, 1), (128, 8, 4, 1))
            ]
    backends = ("cuda", "hopper") if tokens >= 16 else ("cuda",)
    configs += [Config(split=split, backend=backend) for backend in backends for split in (1, 2, 4, 8)]
    return list(dict.fromkeys(configs))


def tune(
    name: str, rows: int, cols: int, tokens: int, device: torch.device, choices: Iterable[Config] | None = None
) -> Config:
    """Time the candidates for a product with bf16 inputs interleaved, store the fastest in the user's table, return it.

    Raises:
        MpqError: the scheme is unknown, or its weights are not the kernels'.
    """
    scheme = parse_scheme(name)
    format, activation = scheme.weight, "" if scheme.activation is None else scheme.activation.name
    if not covers(format):
        raise MpqError(f"the GPU kernels do not support {format.name}: there is nothing to tune")
    device_name, processors = device_facts(device)
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(device)
    arranged = to_layout(pack(quantize(matrix, format)), FRAGMENTS)
    weights = copies(list(arranged.tensors.values()), BEYOND if device.type == "cuda" else 0)
    inputs = torch.randn(tokens, cols, device=device).bfloat16()
    tried = [
        config
        for config in choices or candidates(format, tokens, rows, cols, processors)
        if config.backend == "triton" or (not activation and _passes(config.backend, format, inputs))
    ]
    contestants = [_contestant(inputs, weights, format, rows, config, activation) for config in tried]
    seconds = [statistics.median(times) for times in interleaved(contestants, REPEATS, device)]
    best = tried[seconds.index(min(seconds))]
    remember(device_name, {key_of(format.name, activation, tokens, rows, cols): best})
    return best


def _passes(backend: str, format: Format, inputs: Tensor) -> bool:
    kernel = BACKENDS[backend]
    return kernel.covers(format, inputs) and kernel.runs_on(inputs.device) and not check(backend, inputs.device)


def _contestant(
    inputs: Tensor, weights: list[list[Tensor]], format: Format, rows: int, config: Config, activation: str
) -> Contestant:
    return Contestant([partial(compute, inputs, weight, None, format, rows, config, activation) for weight in weights])
