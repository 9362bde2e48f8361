"""Text generation from causal language models, packed or not, with tokens per second."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.generation.architectures import decoder_of
from mpq.generation.compiled_step import CompiledStep, compiled_step
from mpq.generation.decoder import Decoder, step
from mpq.generation.memory import Memory, can_pack
from mpq.generation.serving import cache_formats_of
from mpq.network.calibration import evaluating, logits_of, seeded

NO_TOKEN = -1  # passed to transformers for no stop token


@dataclass(frozen=True)
class Generation:
    """Generated tokens and speed."""

    tokens: tuple[int, ...]  # without the prompt
    prompt_seconds: float  # until the first token
    seconds: float  # for the tokens after the first

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed without the prompt; NaN for fewer than two tokens."""
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
    stop: Collection[int] = (),  # tokens after which generation stops
) -> Generation:
    """Continue a prompt with a causal language model, in evaluation mode, one sequence.

    LLaMA-style models run in `decoder`. Other transformers models run their own `generate` with their own cache; other
    models recompute all positions for each token.

    Raises:
        MpqError: an empty prompt, or another number that is negative or not finite.
    """
    check_finite(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    if prompt.ndim != 1 or not len(prompt):
        raise MpqError(f"invalid prompt: expected one row of at least one token, not {tuple(prompt.shape)}")
    chosen = _Chosen(partial(choose, temperature=temperature, top_k=top_k, random=seeded(seed, "generate")))
    decoder = decoder_of(model)
    started = time.perf_counter()
    with evaluating(model):
        if decoder is None and hasattr(model, "generate"):
            _own_generation(model, prompt, chosen, max_new_tokens, stop)
        else:
            _loop(_follower(model, decoder, prompt.device), prompt, chosen, max_new_tokens, stop)
    first = chosen.first or started
    return Generation(tuple(chosen.tokens), first - started, time.perf_counter() - first)


def check_finite(**numbers: float) -> None:
    """MpqError naming a number that is negative, infinite or NaN."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise MpqError(f"invalid {name} {value}: expected a finite number of at least 0")


@dataclass
class _Chosen:
    """Tokens chosen so far, and the time of the first."""

    choose: Callable[[Tensor], int]  # logits (vocabulary,) -> token
    tokens: list[int] = field(default_factory=list)
    first: float | None = None

    def take(self, logits: Tensor) -> int:
        token = self.choose(logits)
        self.tokens.append(token)
        if self.first is None:
            self.first = time.perf_counter()
        return token


def _loop(
    follow: Callable[[Tensor], Tensor], prompt: Tensor, chosen: _Chosen, max_new_tokens: int, stop: Collection[int]
) -> None:
    new = prompt.unsqueeze(0)
    for _ in range(max_new_tokens):
        token = chosen.take(follow(new))
        if token in stop:
            break
        new = prompt.new_tensor([[token]])


def _own_generation(model: Any, prompt: Tensor, chosen: _Chosen, max_new_tokens: int, stop: Collection[int]) -> None:
    """Generation by transformers with the model's own cache; tokens are chosen here."""
    import transformers

    settings: Any = transformers.GenerationConfig

    def choose(_: Tensor, logits: Tensor) -> Tensor:
        token = chosen.take(logits[0])
        return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([token], device=logits.device), 0.0)

    config = settings(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stop) or [NO_TOKEN],
        pad_token_id=0,
    )
    tokens = prompt.unsqueeze(0)
    options = {"attention_mask": torch.ones_like(tokens), "generation_config": config, "logits_processor": [choose]}
    model.generate(tokens, **options)


def compare_speeds(
    models: Mapping[str, nn.Module], prompt: Tensor, *, max_new_tokens: int = 64, rounds: int = 3
) -> dict[str, float]:
    """Median tokens per second of each model, greedy, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(generate(model, prompt, max_new_tokens=max_new_tokens).tokens_per_second)
    return {name: sorted(speeds)[len(speeds) // 2] for name, speeds in seconds.items()}


def _follower(model: nn.Module, decoder: Decoder | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens (1, time) to the logits after them, (vocabulary,)."""
    if decoder is not None:
        formats = cache_formats_of(model)
        memory = Memory(formats=formats, packed=formats is not None and can_pack(formats, decoder.head_width, device))
        compiled = compiled_step(decoder) if memory.packed or formats is None else None
        return partial(_follow, decoder, compiled, memory)
    seen: list[Tensor] = []

    def follow(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return logits_of(model(torch.cat(seen, 1)))[0, -1]

    return follow


def _follow(decoder: Decoder, compiled: CompiledStep | None, memory: Memory, tokens: Tensor) -> Tensor:
    logits = compiled(tokens, memory) if compiled and memory.length and tokens.shape[1] == 1 else None
    return step(decoder, tokens, memory) if logits is None else logits


def choose(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    """A token by its logits, (vocabulary,)."""
    if temperature <= 0:
        return int(logits.max(0).indices)  # many times faster than argmax
    logits = logits.float()
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=random))
