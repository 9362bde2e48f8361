"""Text from a causal language model: a light loop over its key-value cache, packed or not, with tokens per second."""

import inspect
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.generation.compiled_step import CompiledStep, compiled_step
from mpq.generation.decoder import Decoder, Memory, decoder_of, step
from mpq.network.calibration import logits_of, seeded


@dataclass(frozen=True)
class Generation:
    """What came out, and how fast."""

    tokens: tuple[int, ...]  # without the prompt
    prompt_seconds: float  # until the first token
    seconds: float  # of the tokens after the first

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the prompt left out; NaN when fewer than two tokens came."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else float("nan")


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,  # int (tokens,)
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,  # 0: always the likeliest token
    top_k: int = 0,  # 0: all
    seed: int = 0,
    stop: Collection[int] = (),  # tokens that end the text, themselves included
) -> Generation:
    """Continue a prompt with a causal language model, in evaluation mode, one sequence.

    LLaMA-style models run in the light loop of `decoder`. Other transformers models keep their own key-value cache; one
    that takes tokens alone computes all positions anew each time.

    Raises:
        MpqError: an empty prompt.
    """
    if prompt.ndim != 1 or not len(prompt):
        raise MpqError(f"a prompt is one row of at least one token, not {tuple(prompt.shape)}")
    random, tokens, follow = seeded(seed, "generate"), [], _follower(model)
    new, training = prompt.unsqueeze(0), model.training
    model.eval()
    started = first = time.perf_counter()
    try:
        for _ in range(max_new_tokens):
            token = _choose(follow(new), temperature, top_k, random)
            tokens.append(token)
            if len(tokens) == 1:
                first = time.perf_counter()
            if token in stop:
                break
            new = prompt.new_tensor([[token]])
    finally:
        model.train(training)
    return Generation(tuple(tokens), first - started, time.perf_counter() - first)


def compare_speeds(
    models: Mapping[str, nn.Module], prompt: Tensor, *, max_new_tokens: int = 64, rounds: int = 3
) -> dict[str, float]:
    """Median tokens per second of each model, greedy, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(generate(model, prompt, max_new_tokens=max_new_tokens).tokens_per_second)
    return {name: sorted(speeds)[len(speeds) // 2] for name, speeds in found.items()}


def _follower(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that takes the next tokens in, (1, time), and gives the logits after them, (vocabulary,)."""
    decoder = decoder_of(model)
    if decoder is not None:
        return partial(_follow, decoder, compiled_step(decoder), Memory())
    taken = inspect.signature(model.forward).parameters
    # transformers has had two names for it
    name = next((name for name in ("past_key_values", "cache") if name in taken), "")
    cache: Any = None
    seen: list[Tensor] = []

    def follow(tokens: Tensor) -> Tensor:
        nonlocal cache
        if name:
            output: Any = model(input_ids=tokens, use_cache=True, **{name: cache})
            cache = getattr(output, name)
        else:
            seen.append(tokens)
            output = model(torch.cat(seen, 1))
        return logits_of(output)[0, -1]

    return follow


def _follow(decoder: Decoder, compiled: CompiledStep | None, memory: Memory, tokens: Tensor) -> Tensor:
    logits = compiled(tokens, memory) if compiled and memory.length and tokens.shape[1] == 1 else None
    return step(decoder, tokens, memory) if logits is None else logits


def _choose(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.max(0).indices)  # many times faster than argmax
    logits = logits.float()
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=random))
