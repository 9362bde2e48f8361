"""Decoding steps of a LLaMA-style model over its own modules, packed or not, used instead of `forward`.

At one token a step, the operations around the linear layers cost as much as the layers. Here they are few: a cache
written in place, query heads of a group as rows of one attention product, logits of the last position only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.cache import CacheFormats
from mpq.core.layer import KEYS, VALUES
from mpq.kernels.kv_cache import round_vectors
from mpq.models.tiny_lm import TinyLM, rotations
from mpq.network.cached import entry_name

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Block:
    """The modules of one block, and the epsilon of its norms."""

    attention_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    q_norm: nn.Module | None = None  # of each head
    k_norm: nn.Module | None = None


@dataclass(frozen=True)
class Decoder:
    """A model's parts; `positions(time)` gives the rotary angles of the first positions, (time, head width)."""

    embed: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module
    head_width: int
    epsilon: float
    positions: Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Memory:
    """The key-value cache, (1, key heads, capacity, head width) for each block, and the rotations."""

    length: int = 0
    capacity: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    formats: CacheFormats | None = None  # that keys and values are rounded to; None: they stay as they are
    rotations: tuple[Tensor, ...] = ()  # cosines and sines, (capacity, head width); the sines' first half negative


def decoder_of(model: nn.Module) -> Decoder | None:
    """The parts of the bundled TinyLM or a transformers Llama; None for other models.

    Rotations that change with the length of the text ("dynamic", "longrope") are left to the model's own code.
    """
    if isinstance(model, TinyLM):
        width = model.config.width // model.config.heads
        blocks = tuple(_blocks(model.blocks, "attention", "attention_norm", "mlp_norm"))
        return Decoder(
            model.embed, blocks, model.norm, model.head, width, 1e-5, lambda time, like: rotations(time, width, like)
        )
    if type(model).__name__ not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        return None
    body: Any = model.model
    config: Any = model.config
    if config.hidden_act != "silu" or body.rotary_emb.rope_type not in ("default", "linear", "llama3", "yarn"):
        return None
    if getattr(config, "sliding_window", None) is not None:
        return None

    def positions(time: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = body.rotary_emb(like, torch.arange(time, device=like.device).unsqueeze(0))
        return cos[0], sin[0]

    blocks = tuple(_blocks(body.layers, "self_attn", "input_layernorm", "post_attention_layernorm"))
    head: Any = model.lm_head
    width = body.layers[0].self_attn.head_dim
    return Decoder(body.embed_tokens, blocks, body.norm, head, width, config.rms_norm_eps, positions)


def _blocks(layers: Any, attention: str, first: str, second: str) -> Iterator[Block]:
    for layer in layers:
        mix, mlp = getattr(layer, attention), layer.mlp
        yield Block(
            getattr(layer, first), mix.q_proj, mix.k_proj, mix.v_proj, mix.o_proj,
            getattr(layer, second), mlp.gate_proj, mlp.up_proj, mlp.down_proj,
            getattr(mix, "q_norm", None), getattr(mix, "k_norm", None),
        )  # fmt: skip


def step(decoder: Decoder, tokens: Tensor, memory: Memory) -> Tensor:  # int (1, time)
    """Process tokens: logits of the next token, (vocabulary,), in the model's type.

    The cache of the preceding tokens, or an empty one, is extended in place.
    """
    x = decoder.embed(tokens)
    time = tokens.shape[1]
    first, last = memory.length, memory.length + time
    if last > memory.capacity:
        grow(decoder, memory, max(64, 2 * last), x)
    cos, sin = (part[first:last] for part in memory.rotations)
    for index, block in enumerate(decoder.blocks):
        h = _norm(block.attention_norm, x, decoder.epsilon)
        q, k, v = (_heads(part(h), decoder.head_width) for part in (block.q, block.k, block.v))
        if block.q_norm is not None and block.k_norm is not None:
            q, k = _norm(block.q_norm, q, decoder.epsilon), _norm(block.k_norm, k, decoder.epsilon)
        if index == len(memory.keys):
            shape = (1, k.shape[1], memory.capacity, decoder.head_width)
            memory.keys.append(k.new_empty(shape))
            memory.values.append(v.new_empty(shape))
        memory.keys[index][:, :, first:last] = rounded(_rotate(k, cos, sin), index, KEYS, memory.formats)
        memory.values[index][:, :, first:last] = rounded(v, index, VALUES, memory.formats)
        past = (memory.keys[index][:, :, :last], memory.values[index][:, :, :last])
        x = x + block.o(_attend(_rotate(q, cos, sin), *past))
        h = _norm(block.mlp_norm, x, decoder.epsilon)
        x = x + block.down(functional.silu(block.gate(h)) * block.up(h))
    memory.length = last
    logits: Tensor = decoder.head(_norm(decoder.norm, x[:, -1], decoder.epsilon))
    return logits[0]


def rounded(vectors: Tensor, index: int, kind: str, formats: CacheFormats | None) -> Tensor:
    """What a cache gives back for a block's keys or values, (1, heads, time, width)."""
    format = None if formats is None else formats.format_of.get(entry_name(index, kind))
    return vectors if format is None else round_vectors(vectors, format)


def _norm(module: Any, x: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], module.weight, epsilon)


def _heads(x: Tensor, width: int) -> Tensor:
    """(1, time, heads * width) to (1, heads, time, width)."""
    return x.view(1, x.shape[1], -1, width).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `mpq.models.tiny_lm.rotate`, with the sign of the half turn in `sin`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last queries, (1, heads, time, width), as (1, time, heads * width)."""
    _, heads, time, width = q.shape
    if time == 1:  # the query heads of a key head are rows of one product, so keys are not repeated
        grouped = q.view(1, keys.shape[1], -1, width)
        return functional.scaled_dot_product_attention(grouped, keys, values).reshape(1, 1, heads * width)
    past = keys.shape[2]
    mask = None if past == time else q.new_ones((time, past), dtype=torch.bool).tril(past - time)
    mixed = functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return mixed.transpose(1, 2).reshape(1, time, heads * width)


def grow(decoder: Decoder, memory: Memory, capacity: int, like: Tensor) -> None:
    """Grow the cache to this many tokens in all; `like` has the model's type."""
    cos, sin = decoder.positions(capacity, like)
    half = sin.shape[-1] // 2
    memory.rotations = (cos, torch.cat((-sin[:, :half], sin[:, half:]), -1))
    for tensors in (memory.keys, memory.values):
        for index, old in enumerate(tensors):
            tensors[index] = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            tensors[index][:, :, : memory.length] = old[:, :, : memory.length]
    memory.capacity = capacity
