"""The small language model of the training studies: Jane Austen, a few hundred steps, seconds per run."""

from collections.abc import Callable
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.models import novel_batches, tokenizer
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded

CONFIG = LMConfig(width=64, hidden=128, layers=2, heads=2, kv_heads=1)  # 139,392 parameters
SEQLEN, BATCH = 64, 16


def training_windows() -> Tensor:
    """Pride and Prejudice, its beginning, (windows, SEQLEN)."""
    options = {"seqlen": SEQLEN, "batch_size": 10**6, "samples": 10**6, "seed": 0}
    return novel_batches("calibration", tokenizer().encode, **options)[0]


def unseen_windows(count: int = 128) -> Tensor:
    """Persuasion, (count, SEQLEN)."""
    return novel_batches("evaluation", tokenizer().encode, seqlen=SEQLEN, batch_size=count, samples=count, seed=0)[0]


def untrained(seed: int) -> TinyLM:
    """A model with weights drawn by the seed."""
    model = TinyLM(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deviation = 0.1 if name.startswith("embed") else parameter.shape[1] ** -0.5 / 2
            parameter.data.normal_(0, deviation, generator=seeded(seed, name))
    return model


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss per predicted token."""
    return functional.cross_entropy(model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module,
    windows: Tensor,
    steps: int,
    *,
    seed: int,
    rate: float = 1e-2,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """AdamW with warm-up and a half-cosine; the loss of every step. Stops at a loss that is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.05)
    generator, losses = seeded(seed, "batches"), []
    for step in range(steps):
        batch = windows[torch.randint(0, len(windows), (BATCH,), generator=generator)]
        factor = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + cos(pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            break
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watch is not None:
            watch(step)
    return losses


@torch.no_grad()
def unseen_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean loss per token of unseen text; infinite where it is not finite."""
    loss = loss_of(model, windows).item()
    return loss if loss == loss else float("inf")
