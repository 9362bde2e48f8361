"""Folders in their consumers: what `consumer.py` finds there, beside what we compute of the same folder."""

import json
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.result import result

WORKER = Path(__file__).with_name("consumer.py")


@dataclass(frozen=True, eq=False)
class Computed:
    """Of windows of tokens: losses of the next tokens, and the likeliest ones, (windows, length - 1)."""

    losses: Tensor
    tops: Tensor
    tokens_per_second: float = math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.mean()))


def served(
    python: str, consumer: str, folder: Path, windows: Tensor, dtype: str = "float32", timeout: float = 1800
) -> Computed:
    """What a consumer computes of a folder.

    Raises:
        RuntimeError: it failed; its last words.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "windows.json"
        file.write_text(json.dumps(windows.tolist()))
        command = [python, str(WORKER), consumer, str(folder), str(file), "--dtype", dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{consumer} failed on {folder} with {done.returncode}: {done.stderr[-1000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Computed(torch.tensor(answer["losses"]), torch.tensor(answer["tops"]), answer["tokens_per_second"])


@torch.no_grad()
def simulated(model: nn.Module, windows: Tensor) -> Computed:
    """The same of a model of ours."""
    losses, tops = [], []
    for row in windows:
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(functional.cross_entropy(logits, row[1:], reduction="none"))
        tops.append(logits.argmax(-1))
    return Computed(torch.stack(losses), torch.stack(tops))


def compared(name: str, ours: Computed, theirs: Computed, gap: float = 0.002, agreement: float = 0.97) -> list[str]:
    """The RESULT lines of a folder: gap of perplexity and share of equal likeliest tokens."""
    difference, same = abs(theirs.perplexity / ours.perplexity - 1), float((ours.tops == theirs.tops).float().mean())
    print(
        f"{name}: simulated {ours.perplexity:.4f}, served {theirs.perplexity:.4f}, same top choice {100 * same:.2f} %, "
        f"largest difference of a token's loss {float((ours.losses - theirs.losses).abs().max()):.2g}, "
        f"{theirs.tokens_per_second:.0f} tokens per second of prompt",
        flush=True,
    )
    return [
        result(f"{name}_perplexity_gap", difference, f"<={gap}", difference <= gap),
        result(f"{name}_top1_agreement", same, f">={agreement}", same >= agreement),
    ]
