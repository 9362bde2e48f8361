"""Text from several prompts at once, each with its own cache: weights are read once for all of them."""

import time
from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.generation.architectures import decoder_of
from mpq.generation.decoder import step, step_each
from mpq.generation.generate import Generation, check_finite, choose
from mpq.generation.memory import Memory, can_pack
from mpq.generation.serving import cache_formats_of
from mpq.network.calibration import evaluating, seeded


@torch.inference_mode()
def generate_batch(
    model: nn.Module,
    prompts: Sequence[Tensor],  # int (tokens,) each, of any lengths
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> list[Generation]:
    """Continue several prompts with a LLaMA-style model, one token of each a step, as `generate` continues one.

    A sequence that stops leaves the batch. Speeds are those of the whole batch: a sequence's seconds end with its last
    token.

    Raises:
        MpqError: no prompts, an empty one, another number that is negative or not finite, or a model that the light
            loop does not compute.
    """
    check_finite(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    decoder = decoder_of(model)
    if decoder is None:
        raise MpqError(f"{type(model).__name__} cannot generate for several prompts at once: call generate for each")
    if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
        raise MpqError("invalid prompts: expected at least one, each a row of at least one token")
    formats = cache_formats_of(model)
    packed = can_pack(formats, decoder.head_width, prompts[0].device)
    pick = partial(choose, temperature=temperature, top_k=top_k)
    randoms = [seeded(seed, "generate", place) for place in range(len(prompts))]
    memories = [Memory(formats=formats, packed=packed) for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    ends, started = [0.0] * len(prompts), time.perf_counter()
    with evaluating(model):
        logits = [step(decoder, prompt.unsqueeze(0), memory) for prompt, memory in zip(prompts, memories, strict=True)]
        prompted, active = time.perf_counter(), list(range(len(prompts)))
        while active and max_new_tokens:
            for place, row in zip(active, logits, strict=True):
                texts[place].append(pick(row, random=randoms[place]))
                ends[place] = time.perf_counter()
            active = [place for place in active if len(texts[place]) < max_new_tokens and texts[place][-1] not in stop]
            if active:
                tokens = prompts[0].new_tensor([texts[place][-1] for place in active])
                logits = list(step_each(decoder, tokens, [memories[place] for place in active]))
    return [
        Generation(tuple(tokens), prompted - started, max(0.0, end - prompted))
        for tokens, end in zip(texts, ends, strict=True)
    ]


def throughput(generations: Sequence[Generation]) -> float:
    """Decoding speed of sequences generated together, in tokens per second; NaN for fewer than two tokens each."""
    decoded, seconds = sum(len(one.tokens) - 1 for one in generations), max(one.seconds for one in generations)
    return decoded / seconds if seconds > 0 and decoded > 0 else float("nan")
