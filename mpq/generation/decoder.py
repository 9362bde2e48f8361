"""Decoding steps of a LLaMA-style model over its own modules, packed or not, used instead of `forward`.

At one token a step, the operations around the linear layers cost as much as the layers. Here they are few: a cache
written in place, query heads of a group as rows of one attention product, logits of the last position only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.generation.memory import Memory, attend, attend_each, enlarge, store, store_each


@dataclass(frozen=True)
class Block:
    """The modules of one block."""

    attention_norm: nn.Module
    q: nn.Module  # where `fused`, all three rows of q, k and v
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module  # where `fused`, the rows of gate and up
    up: nn.Module
    down: nn.Module
    q_norm: nn.Module | None = None  # norm of each head's queries
    k_norm: nn.Module | None = None
    after_attention: nn.Module | None = None  # norm of what attention adds
    after_mlp: nn.Module | None = None
    fused: tuple[int, int, int] | None = None  # rows of q, k and v in one module
    window: int | None = None  # a token sees that many, itself included
    local: bool = False  # whether it has the rotations of local attention


@dataclass(frozen=True)
class Decoder:
    """A model's parts; `positions(time)` gives the cosines and sines of the first positions, (time, rotated width)."""

    embed: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module
    head_width: int
    epsilon: float
    positions: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    local_positions: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None  # for blocks with local attention
    activation: Callable[[Tensor], Tensor] = functional.silu
    scale: float | None = None  # factor of query-key products; None: 1 / sqrt(head width)
    own_norms: bool = False  # whether norms compute something else than RMSNorm

    @property
    def is_llama(self) -> bool:
        """Whether nothing in it goes beyond a Llama."""
        own = (block.fused or block.window or block.after_mlp or block.q_norm for block in self.blocks)
        return self.activation is functional.silu and self.scale is None and not self.own_norms and not any(own)


def step(decoder: Decoder, tokens: Tensor, memory: Memory) -> Tensor:  # int (1, time)
    """Process tokens: logits of the next token, (vocabulary,), in the model's type.

    The cache of the preceding tokens, or an empty one, is extended in place.
    """
    x = decoder.embed(tokens)
    time = tokens.shape[1]
    first, last = memory.length, memory.length + time
    if last > memory.capacity:
        grow(decoder, memory, max(64, 2 * last), x)
    rotations = [tuple(part[first:last] for part in parts) for parts in (memory.rotations, memory.local_rotations)]

    def mix(index: int, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store(memory, index, k, v)
        return attend(memory, index, q, k, v, decoder.scale, block.window)

    x = run_blocks(decoder, x, rotations, mix)
    memory.length = last
    logits: Tensor = decoder.head(_norm(decoder, decoder.norm, x[:, -1]))
    return logits[0]


def step_each(decoder: Decoder, tokens: Tensor, memories: Sequence[Memory]) -> Tensor:  # int (sequences,)
    """Process one token of each of several sequences with caches of their own: logits (sequences, vocabulary).

    Each cache holds at least one token and is extended in place.
    """
    x = decoder.embed(tokens.unsqueeze(1))
    for memory in memories:
        if memory.length == memory.capacity:
            grow(decoder, memory, 2 * memory.length + 2, x)
    rotations = [
        _positions_of([memory.rotations for memory in memories], memories),
        _positions_of([memory.local_rotations for memory in memories], memories),
    ]

    def mix(index: int, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store_each(memories, index, k, v)
        return attend_each(memories, index, q, k, v, decoder.scale, block.window)

    x = run_blocks(decoder, x, rotations, mix)
    for memory in memories:
        memory.length += 1
    logits: Tensor = decoder.head(_norm(decoder, decoder.norm, x[:, -1]))
    return logits


def _positions_of(rotations: Sequence[tuple[Tensor, ...]], memories: Sequence[Memory]) -> tuple[Tensor, ...]:
    """Cosines and sines of each sequence's next position, (sequences, 1, 1, rotated width)."""
    each = [[part[memory.length] for part in own] for own, memory in zip(rotations, memories, strict=True)]
    return tuple(torch.stack(same)[:, None, None] for same in zip(*each, strict=True))


def run_blocks(
    decoder: Decoder,
    x: Tensor,  # (sequences, time, width)
    rotations: Sequence[tuple[Tensor, ...]],  # cosines and sines of x's positions, global and local
    mix: Callable[[int, Block, Tensor, Tensor, Tensor], Tensor],  # queries, keys, values -> attention's outputs
) -> Tensor:
    """All blocks; `mix` keeps the cache."""
    for index, block in enumerate(decoder.blocks):
        cos, sin = rotations[block.local]
        h = _norm(decoder, block.attention_norm, x)
        q, k, v = (_heads(part, decoder.head_width) for part in _projections(block, h))
        if block.q_norm is not None and block.k_norm is not None:
            q, k = _norm(decoder, block.q_norm, q), _norm(decoder, block.k_norm, k)
        mixed = block.o(mix(index, block, _rotate(q, cos, sin), _rotate(k, cos, sin), v))
        x = x + (mixed if block.after_attention is None else _norm(decoder, block.after_attention, mixed))
        mixed = _mlp(decoder, block, _norm(decoder, block.mlp_norm, x))
        x = x + (mixed if block.after_mlp is None else _norm(decoder, block.after_mlp, mixed))
    return x


def _projections(block: Block, h: Tensor) -> tuple[Tensor, ...]:
    if block.fused is not None:
        return tuple(torch.split(block.q(h), list(block.fused), -1))
    return block.q(h), block.k(h), block.v(h)


def _mlp(decoder: Decoder, block: Block, h: Tensor) -> Tensor:
    gate, up = block.gate(h).chunk(2, -1) if block.fused is not None else (block.gate(h), block.up(h))
    outputs: Tensor = block.down(decoder.activation(gate) * up)
    return outputs


def _norm(decoder: Decoder, module: Any, x: Tensor) -> Tensor:
    if decoder.own_norms:
        normalized: Tensor = module(x)
        return normalized
    return functional.rms_norm(x, x.shape[-1:], module.weight, decoder.epsilon)


def _heads(x: Tensor, width: int) -> Tensor:
    """(sequences, time, heads * width) to (sequences, heads, time, width)."""
    return x.view(len(x), x.shape[1], -1, width).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `mpq.models.tiny_lm.rotate`, with the sign of the half turn in `sin`; what is wider than that stays."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((_rotate(x[..., :width], cos, sin), x[..., width:]), -1)
    return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)


def grow(decoder: Decoder, memory: Memory, capacity: int, like: Tensor) -> None:
    """Grow the cache to this many tokens in all; `like` has the model's type."""
    memory.rotations = _signed(*decoder.positions(capacity, like))
    if decoder.local_positions is not None:
        memory.local_rotations = _signed(*decoder.local_positions(capacity, like))
    enlarge(memory, capacity)


def _signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)
