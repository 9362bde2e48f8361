"""Divergence of runs of one model under different runtime configurations (arXiv 2506.09501, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from mpq.network.calibration import evaluating, logits_of


@dataclass(frozen=True, eq=False)
class Generation:
    """Greedy continuations of prompts in one configuration."""

    tokens: NDArray[np.int64]  # (prompts, steps)
    probabilities: NDArray[np.float64]  # (prompts, steps), probability of the chosen (likeliest) token


def generate(model: nn.Module, prompts: Tensor, steps: int, padding: int = 0) -> Generation:
    """Generate `steps` greedy tokens; prompts (prompts, time) have one length.

    Behind them stand `padding` zeros, which a causal model's predictions do not see.
    """
    tokens, taken, probabilities = prompts, [], []
    with torch.no_grad(), evaluating(model):
        for _ in range(steps):
            padded = functional.pad(tokens, (0, padding))
            chances = logits_of(model(padded))[:, tokens.shape[1] - 1].double().softmax(-1)
            probability, token = chances.max(-1)
            tokens = torch.cat((tokens, token.unsqueeze(1)), 1)
            taken.append(token)
            probabilities.append(probability)
    return Generation(torch.stack(taken, 1).cpu().numpy(), torch.stack(probabilities, 1).cpu().numpy())


def std_at_accuracy(accuracies: ArrayLike) -> float:
    """Std@Acc: sample standard deviation of the accuracy over configurations."""
    return float(np.std(np.asarray(accuracies, dtype=np.float64), ddof=1))


def average_std_of_lengths(lengths: ArrayLike) -> float:
    """Avg_Std@Output_Length: deviations over configurations, averaged over examples; (configurations, examples)."""
    return float(np.std(np.asarray(lengths, dtype=np.float64), axis=0, ddof=1).mean())


def divergence_index(outputs: Sequence[Sequence[int]]) -> int | None:
    """Div_Index: the first position at which the runs of one prompt have different tokens; None where they agree. A run
    that ends before others differs at its end.

    >>> divergence_index([[5, 6, 7], [5, 6, 8]]), divergence_index([[5], [5]]), divergence_index([[5, 6], [5]])
    (2, None, 1)
    """
    shortest = min(map(len, outputs))
    for position in range(shortest):
        if len({int(output[position]) for output in outputs}) > 1:
            return position
    return None if max(map(len, outputs)) == shortest else shortest


def divergence_indices(runs: Sequence[Generation]) -> list[int | None]:
    """Div_Index of every prompt."""
    return [divergence_index([run.tokens[i].tolist() for run in runs]) for i in range(len(runs[0].tokens))]


def average_std_of_probability(runs: Sequence[Generation]) -> float:
    """Avg_Std@top1_prob: sample deviation over configurations of the likeliest token's probability, averaged over the
    positions up to the first divergence (whose prefix is still common) and over prompts.
    """
    averages = []
    for prompt, index in enumerate(divergence_indices(runs)):
        last = runs[0].tokens.shape[1] if index is None else index + 1
        probabilities = np.stack([run.probabilities[prompt, :last] for run in runs])
        averages.append(probabilities.std(axis=0, ddof=1).mean())
    return float(np.mean(averages))
