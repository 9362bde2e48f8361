"""Dependence of a model's greedy answers on how they are computed (arXiv 2506.09501, section 3).

The same prompts run in several configurations, which mathematically give the same: batch sizes, padding, threads. The
paper's measures say how far the answers drift apart, in each precision side by side.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.lowprecision.divergence import (
    Generation,
    average_std_of_probability,
    divergence_indices,
    generate,
)
from mpq.lowprecision.layercast import layercast

PRECISIONS = ("bfloat16", "layercast", "float32")


@dataclass(frozen=True)
class Configuration:
    """A way to run prompts: in batches, with tokens after their ends that nothing attends to, on some threads."""

    batch: int = 1
    padding: int = 0
    threads: int = 1

    @property
    def name(self) -> str:
        """Name such as "batch 4, padding 3, 2 threads"."""
        return f"batch {self.batch}, padding {self.padding}, {self.threads} thread{'s' * (self.threads > 1)}"


CONFIGURATIONS = (
    Configuration(), Configuration(batch=3), Configuration(batch=8), Configuration(batch=8, padding=5),
    Configuration(batch=8, threads=2),
)  # fmt: skip


@dataclass(frozen=True)
class Reproducibility:
    """Results of the configurations in one precision."""

    precision: str
    spread: float  # Avg_Std@top1_prob
    divergence: tuple[int | None, ...]  # Div_Index of each prompt: first token that differs, None where none does
    identical: float  # share of prompts whose probabilities are equal bit for bit in all configurations
    largest: float  # largest range of a probability over the configurations, up to the first token that differs
    nbytes: int  # bytes of parameters and buffers, shared ones once

    @property
    def diverged(self) -> float:
        """Share of prompts whose answers differ."""
        return sum(index is not None for index in self.divergence) / len(self.divergence)

    @property
    def first(self) -> int | None:
        """The first token that differs in any prompt."""
        return min((index for index in self.divergence if index is not None), default=None)


def reproducibility(
    model: nn.Module,
    prompts: Tensor,  # int (prompts, time)
    steps: int = 16,
    *,
    configurations: Sequence[Configuration] = CONFIGURATIONS,
    precisions: Sequence[str] = PRECISIONS,
) -> tuple[Reproducibility, ...]:
    """Measure a causal language model, packed or not, in each precision.

    Weights have bfloat16's values in all precisions: "bfloat16" computes in it, "layercast" stores bfloat16 and
    computes in float32, "float32" stores float32, too. Packed weights stay packed in all three. All positions are
    computed anew for every token; the model itself stays as it is.

    Args:
        model: of tokens to logits, (batch, time) to (batch, time, vocabulary), or an object that has them.
        prompts: of one length.
        steps: greedy tokens of each prompt.
        configurations: at least two.
        precisions: names of `PRECISIONS`.

    Raises:
        MpqError: fewer than two configurations, no prompts or steps, or an unknown precision.
    """
    if len(configurations) < 2 or not prompts.numel() or steps < 1:
        raise MpqError("reproducibility takes two or more configurations, prompts, and steps, to compare anything")
    for name in precisions:
        if name not in PRECISIONS:
            raise MpqError(f"precision is one of {', '.join(PRECISIONS)}, not {name!r}")
    rounded = copy.deepcopy(model).bfloat16()
    results = []
    for precision in precisions:
        cast = copy.deepcopy(rounded)
        cast = layercast(cast) if precision == "layercast" else cast.to(getattr(torch, precision))
        results.append(compared(precision, [run(cast, prompts, steps, one) for one in configurations], bytes_of(cast)))
    return tuple(results)


def run(model: nn.Module, prompts: Tensor, steps: int, configuration: Configuration) -> Generation:
    """Greedy continuations of all prompts in one configuration."""
    with _threads(configuration.threads):
        batches = torch.split(prompts, configuration.batch)
        parts = [generate(model, batch, steps, configuration.padding) for batch in batches]
    return Generation(
        np.concatenate([part.tokens for part in parts]), np.concatenate([part.probabilities for part in parts])
    )


def compared(precision: str, runs: Sequence[Generation], nbytes: int = 0) -> Reproducibility:
    """The measures of two or more runs of the same prompts."""
    probabilities = np.stack([run.probabilities for run in runs])
    same = (probabilities == probabilities[0]).all((0, 2))
    indices = tuple(divergence_indices(runs))
    ranges = probabilities.max(0) - probabilities.min(0)
    largest = max(
        float(row[: None if end is None else end + 1].max()) for row, end in zip(ranges, indices, strict=True)
    )
    return Reproducibility(precision, average_std_of_probability(runs), indices, float(same.mean()), largest, nbytes)


def table_of(answers: Sequence[Reproducibility]) -> str:
    """The precisions side by side, a line each."""
    lines = [f"{'answers in':12}{'first token that differs':>26}{'answers that differ':>21}{'bit-identical':>15}"
             f"{'largest difference':>20}{'Avg_Std@top1_prob':>19}{'MB':>9}"]  # fmt: skip
    for one in answers:
        first = "none" if one.first is None else str(one.first)
        lines.append(
            f"{one.precision:12}{first:>26}{one.diverged:>21.0%}{one.identical:>15.0%}"
            f"{one.largest:>20.1e}{one.spread:>19.1e}{one.nbytes / 1e6:>9.2f}"
        )
    return "\n".join(lines)


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
