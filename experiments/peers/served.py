"""Compare a folder served by its consumer (`consumer.py`) with the simulated model."""

import json
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.peers.consumer import LIKELIEST
from experiments.result import result

WORKER = Path(__file__).with_name("consumer.py")


@dataclass(frozen=True, eq=False)
class Computed:
    """Predictions on windows of tokens: losses of the next tokens, (windows, length - 1), and the most likely tokens in
    descending order with their log-probabilities, (windows, length - 1, tokens).
    """

    losses: Tensor
    likeliest: Tensor
    logs: Tensor
    tokens_per_second: float = math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.mean()))

    @property
    def tops(self) -> Tensor:
        return self.likeliest[..., 0]


def served(
    python: str, consumer: str, folder: Path, windows: Tensor, dtype: str = "float32", timeout: float = 1800
) -> Computed:
    """Evaluate a folder in a consumer.

    Raises:
        RuntimeError: the consumer failed, with its last line of output.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "windows.json"
        file.write_text(json.dumps(windows.tolist()))
        command = [python, str(WORKER), consumer, str(folder), str(file), "--dtype", dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{consumer} failed on {folder} with {done.returncode}: {done.stderr[-1000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    parts = (torch.tensor(answer[key]) for key in ("losses", "likeliest", "logs"))
    return Computed(*parts, tokens_per_second=answer["tokens_per_second"])


@torch.no_grad()
def simulated(model: nn.Module, windows: Tensor) -> Computed:
    """The same predictions by our model."""
    return _simulated(model, windows)[0]


def compared(
    name: str, model: nn.Module, windows: Tensor, theirs: Computed, gap: float = 0.002, agreement: float = 0.97
) -> list[str]:
    """RESULT lines of a served folder against the simulated model: gap of perplexity, share of equal top-1 tokens, and
    KL divergence in nats over the most likely tokens, with all others merged into one.
    """
    ours, divergence = _simulated(model, windows, theirs)
    difference, same = abs(theirs.perplexity / ours.perplexity - 1), float((ours.tops == theirs.tops).float().mean())
    print(
        f"{name}: simulated {ours.perplexity:.4f}, served {theirs.perplexity:.4f} ({100 * difference:.3f} %), "
        f"KL {divergence:.2g}, same top choice {100 * same:.2f} %, "
        f"largest difference of a token's loss {float((ours.losses - theirs.losses).abs().max()):.2g}, "
        f"{theirs.tokens_per_second:.0f} tokens per second of prompt",
        flush=True,
    )
    return [
        result(f"{name}_perplexity_gap", difference, f"<={gap}", difference <= gap),
        result(f"{name}_top1_agreement", same, f">={agreement}", same >= agreement),
    ]


@torch.no_grad()
def _simulated(model: nn.Module, windows: Tensor, theirs: Computed | None = None) -> tuple[Computed, float]:
    losses, likeliest, logs, divergences = [], [], [], []
    for index, row in enumerate(windows):
        known = functional.log_softmax(model(row[None]).logits[0, :-1].float(), -1)
        losses.append(-known.gather(1, row[1:, None])[:, 0])
        best = known.topk(min(LIKELIEST, known.shape[1]))
        likeliest.append(best.indices)
        logs.append(best.values)
        if theirs is not None:
            divergences.append(_divergence(theirs.logs[index], known.gather(1, theirs.likeliest[index])))
    found = torch.cat(divergences).mean() if divergences else torch.tensor(math.nan)
    return Computed(torch.stack(losses), torch.stack(likeliest), torch.stack(logs)), float(found)


def _divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL divergence at each position from log-probabilities (positions, tokens) of the same tokens; the remaining
    probability counts as one more token. A lower bound of the divergence over all tokens.
    """
    parts = []
    for logs in (theirs, ours):
        left = (1 - logs.double().exp().sum(-1, keepdim=True)).clamp_min(1e-9)
        parts.append(torch.cat((logs.double(), left.log()), -1))
    return (parts[0].exp() * (parts[0] - parts[1])).sum(-1)
