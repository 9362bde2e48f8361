"""A LLaMA-style language model small enough to ship: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.network.cached import CachePoint


@dataclass(frozen=True)
class LMConfig:
    """Sizes of a TinyLM. All widths are multiples of 128, the usual group of 4-bit formats."""

    vocabulary: int = 1024
    width: int = 128
    hidden: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 256


class Attention(nn.Module):
    """Causal self-attention; several query heads share a key and value head. (batch, time, width) to the same."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        head = config.width // config.heads
        self.q_proj = nn.Linear(config.width, config.heads * head, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.heads * head, config.width, bias=False)
        self.keys, self.values = CachePoint("keys"), CachePoint("values")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention; cos and sin are the rotary angles', (time, head width)."""
        q = rotate(self._split(self.q_proj(x), self.heads), cos, sin)
        k = self.keys(rotate(self._split(self.k_proj(x), self.kv_heads), cos, sin))
        v = self.values(self._split(self.v_proj(x), self.kv_heads))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU. (batch, time, width) to the same."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each on normalized inputs and with a residual connection."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class TinyLM(nn.Module):
    """Tokens (batch, time) to logits of the next token (batch, time, vocabulary); input and output share a matrix."""

    def __init__(self, config: LMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LMConfig()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.embed(tokens)
        cos, sin = rotations(tokens.shape[1], self.config.width // self.config.heads, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotations(time: int, width: int, like: Tensor, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions (RoFormer, arXiv 2104.09864), (time, width), halves repeated."""
    frequency = base ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(time, device=like.device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + width / 2) of each position's vector. (batch, heads, time, width) to the same."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
