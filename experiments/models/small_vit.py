"""A small vision transformer for the bundled 8x8 digits."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, DEPTH, TOKENS = 32, 4, 2, 16


class Layer(nn.Module):
    """Attention and a feed-forward network, each after a normalization: (batch, tokens, width) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class SmallViT(nn.Module):
    """(batch, 1, 8, 8) -> (batch, 10): patches of 2x2, learned positions, the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten digits."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out
