"""Checkpoints of a fine-tuning: weights, optimizer, losses, and the settings that must match to resume."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically


def save(
    path: Path, identity: Mapping[str, str], student: nn.Module, optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
) -> None:  # fmt: skip
    """Write a checkpoint, atomically."""
    state = {
        "identity": dict(identity), "losses": list(losses), "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    with write_atomically(path) as draft:
        torch.save(state, draft)


def resume(
    path: Path | None, identity: Mapping[str, str], student: nn.Module, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Load a checkpoint, if there is one; returns the losses so far.

    Raises:
        MpqError: no checkpoint, or one of another fine-tuning (the first difference is named).
    """
    if path is None or not path.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        theirs: dict[str, str] = state["identity"]
    except Exception as error:
        raise MpqError(f"{path} is not a checkpoint of a fine-tuning: remove it to start again") from error
    for name in identity:
        if theirs.get(name) != identity[name]:
            what = name if name in ("model", "data") else f"{name} ({theirs.get(name)}, not {identity[name]})"
            raise MpqError(f"the checkpoint {path} is of a fine-tuning with another {what}: remove it to start again")
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return list(map(float, state["losses"]))
