"""Settings of a fine-tuning."""

import math
from dataclasses import dataclass, field

from mpq.core.errors import MpqError
from mpq.training.objective import Objective

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Finetuning:
    """Settings of a student's training.

    Raises:
        MpqError: a number out of its range.
    """

    steps: int = 300
    lr: float | str = "auto"  # weights' rate, falling to zero along half a cosine; "auto": from the loss's curvature
    scale_lr: float = 1e-3  # rate of learned scales, relative to each scale; with SGD, `lr` is LSQ's rate for them too
    optimizer: str = "adam"  # or "sgd"
    momentum: float = 0.9  # SGD's momentum; "auto" sets it too
    accumulate: int = 1  # batches of a step
    objective: Objective = field(default_factory=Objective)
    stages: int = 1  # stages in which layers are quantized, the most sensitive first (HAWQ)
    learned: bool = True  # whether scales are parameters (LSQ)
    freeze_batchnorm: bool = False  # keep the statistics of batch normalizations
    bfloat16: bool = False  # compute in bfloat16, with weights in float32
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # seed of data order and dropout

    def __post_init__(self) -> None:
        if min(self.accumulate, self.save_every, self.stages) < 1 or self.steps < self.stages:
            raise MpqError(
                "invalid fine-tuning: expected steps, accumulate, save_every and stages of at least 1, stages <= steps"
            )
        if self.lr != "auto" and (isinstance(self.lr, str) or not 0 < self.lr < math.inf):
            raise MpqError(f"invalid lr {self.lr!r}: expected a positive number or 'auto'")
        if not (0 <= self.scale_lr < math.inf and 0 <= self.momentum < 1):
            raise MpqError(
                f"invalid fine-tuning: expected a scale_lr of at least 0 and a momentum in [0, 1), not {self.scale_lr} "
                f"and {self.momentum}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise MpqError(f"unknown optimizer {self.optimizer!r}: expected adam or sgd")
