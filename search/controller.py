"""The policy of a one-shot search (FLIQS, arXiv 2308.03290): a softmax over schemes for each decision, by REINFORCE."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.errors import MpqError, nearest_names
from mpq.network.calibration import seeded

IMPOSSIBLE = -1e9  # logit of an option that a decision does not have
ENTROPIES: Mapping[str, Callable[[float], float]] = {  # share of the weight by progress, both from 0 to 1
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
    "step": lambda progress: float(progress >= 0.5),
    "constant": lambda progress: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """Settings of a policy's learning.

    Raises:
        MpqError: a delay that leaves no step to learn in, or a number out of its range.
    """

    steps: int = 2000  # updates until the policy is fixed
    delay: float = 0.125  # share of the steps that sample uniformly while the weights adapt to quantization
    rate: float = 0.02  # Adam's learning rate of the logits
    cost_weight: float = 1.0  # reward = quality - cost_weight * |1 - cost / target|, the absolute reward of TuNAS
    entropy_weight: float = 0.1  # largest weight of the entropy penalty
    entropy: str = "cosine"  # its schedule: half a "cosine", "linear", a "step" half-way, or "constant"
    decay: float = 0.95  # decay of the moving-average baseline

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.delay < 1:
            raise MpqError(
                f"invalid schedule: expected at least one step and a delay in [0, 1), not {self.steps}, {self.delay}"
            )
        if min(self.rate, self.cost_weight, self.entropy_weight) < 0 or not 0 <= self.decay < 1:
            raise MpqError("invalid schedule: expected rate and weights of at least 0, and a decay in [0, 1)")
        if self.entropy not in ENTROPIES:
            raise MpqError(f"unknown entropy schedule {self.entropy!r}: {nearest_names(self.entropy, ENTROPIES)}")

    @property
    def uniform_steps(self) -> int:
        """Updates before the policy learns."""
        return int(self.delay * self.steps)

    def entropy_at(self, step: int) -> float:
        """Weight of the entropy penalty, from the end of the delay on."""
        progress = (step - self.uniform_steps) / max(1, self.steps - self.uniform_steps)
        return self.entropy_weight * ENTROPIES[self.entropy](min(max(progress, 0.0), 1.0))


@dataclass(frozen=True)
class Step:
    """Record of one update."""

    choices: tuple[int, ...]
    quality: float
    cost: float  # as a share of the target
    reward: float
    entropy: float  # mean over decisions, in nats, before the update


class Controller:
    """A policy that samples one option for each decision and learns from rewards.

    Samples depend on the seed and the number of updates only, so that all workers of data-parallel training draw the
    same ones if they pass the same qualities.
    """

    def __init__(
        self, decisions: int, options: int, schedule: Schedule, seed: int = 0, counts: Sequence[int] | None = None
    ) -> None:
        self.schedule, self.seed, self.step = schedule, seed, 0
        self.baseline: float | None = None
        self.counts = torch.tensor(counts or [options] * decisions)  # options of each decision
        impossible = torch.arange(options) >= self.counts.unsqueeze(1)
        logits = torch.zeros(decisions, options, dtype=torch.float32)
        self.logits = logits.masked_fill_(impossible, IMPOSSIBLE).requires_grad_()
        self._optimizer = torch.optim.Adam([self.logits], lr=schedule.rate)

    @property
    def probabilities(self) -> Tensor:
        """(decisions, options)."""
        return self.logits.detach().softmax(1)

    @property
    def is_fixed(self) -> bool:
        """Whether the schedule's steps are over."""
        return self.step >= self.schedule.steps

    @property
    def entropy(self) -> float:
        """Mean over decisions, in nats."""
        return float(torch.special.entr(self.probabilities).sum(1).mean())

    def sample(self) -> NDArray[np.intp]:
        """One option for each decision: (decisions,). The same until the next update."""
        generator = seeded(self.seed, "one-shot", self.step)
        if self.step < self.schedule.uniform_steps:
            decisions, options = self.logits.shape
            drawn = torch.randint(0, options * 2**32, (decisions,), generator=generator)
            return (drawn % self.counts).numpy().astype(np.intp)
        return torch.multinomial(self.probabilities, 1, generator=generator)[:, 0].numpy().astype(np.intp)

    def best(self) -> NDArray[np.intp]:
        """The likeliest option of each decision: (decisions,)."""
        return self.logits.detach().argmax(1).numpy().astype(np.intp)

    def update(self, choices: Sequence[int] | NDArray[np.intp], quality: float, cost: float) -> Step:
        """Update the policy with the quality and cost of the sampled choices.

        The advantage is taken over the average of the rewards before this one. A quality that is not finite is
        ignored, and so is every one after the schedule's steps.

        Args:
            choices: the sampled options, (decisions,).
            quality: higher is better.
            cost: as a share of the target.
        """
        quality, cost = float(quality), float(cost)
        reward = quality - self.schedule.cost_weight * abs(1 - cost)
        step = Step(tuple(int(choice) for choice in choices), quality, cost, reward, self.entropy)
        if math.isfinite(reward):
            learning = self.schedule.uniform_steps <= self.step < self.schedule.steps
            if learning and self.baseline is not None:
                self._learn(step, reward - self.baseline)
            decay = self.schedule.decay
            self.baseline = reward if self.baseline is None else decay * self.baseline + (1 - decay) * reward
        self.step += 1
        return step

    def _learn(self, step: Step, advantage: float) -> None:
        log_probabilities = self.logits.log_softmax(1)
        chosen = log_probabilities.gather(1, torch.tensor(step.choices).unsqueeze(1)).sum()
        entropy = -(log_probabilities.exp() * log_probabilities).sum()
        self._optimizer.zero_grad()
        torch.autograd.backward(self.schedule.entropy_at(self.step) * entropy - advantage * chosen)
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: tensors, numbers and names only."""
        return {
            "schedule": asdict(self.schedule), "seed": self.seed, "step": self.step, "baseline": self.baseline,
            "logits": self.logits.detach().clone(), "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint.

        Raises:
            MpqError: a checkpoint of another search: other decisions, options, schedule or seed.
        """
        theirs, ours = tuple(state["logits"].shape), tuple(self.logits.shape)
        if theirs != ours:
            raise MpqError(f"the checkpoint has {theirs} decisions and options, this search {ours}")
        if (state["schedule"], state["seed"]) != (asdict(self.schedule), self.seed):
            raise MpqError("the checkpoint is of a search with another schedule or seed: use the same ones to resume")
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.step, self.baseline = state["step"], state["baseline"]
        self._optimizer.load_state_dict(state["optimizer"])
