"""One layer's keys or values as they are stored, token by token or in blocks of tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.core.cache import TokenBlocks, head_bytes
from mpq.core.formats import Format
from mpq.kernels.kv_cache import dequantize_heads, from_bytes, quantize_heads, to_bytes
from mpq.kernels.token_blocks import pack_blocks, unpack_blocks, whole


class StoredVectors:
    """Vectors (batch, heads, tokens, width) that grow at the end."""

    def __init__(self, format: Format, like: Tensor) -> None:
        self.format, self.width, self.dtype = format, like.shape[3], like.dtype
        size = format.block_bytes(self.width) if isinstance(format, TokenBlocks) else head_bytes(format, self.width)
        self.stored = like.new_empty((*like.shape[:2], 0, size), dtype=torch.uint8)  # tokens, or blocks of them
        self.newest = like[:, :, :0]  # floats, of `TokenBlocks` alone

    def _bytes(self, vectors: Tensor) -> Tensor:
        return to_bytes(quantize_heads(vectors, self.format))

    @property
    def tokens(self) -> int:
        """Number of vectors."""
        blocks = self.format.tokens if isinstance(self.format, TokenBlocks) else 1
        return self.stored.shape[2] * blocks + self.newest.shape[2]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.stored.nbytes + self.newest.nbytes

    def append(self, vectors: Tensor) -> None:
        """Add new tokens; blocks that they fill are rounded."""
        if not isinstance(self.format, TokenBlocks):
            self.stored = torch.cat([self.stored, self._bytes(vectors)], 2)
            return
        floats = torch.cat([self.newest, vectors], 2)
        filled = whole(floats.shape[2], self.format)
        if filled:
            self.stored = torch.cat([self.stored, pack_blocks(floats[:, :, :filled], self.format)], 2)
        self.newest = floats[:, :, filled:].clone()

    def read(self) -> Tensor:
        """All vectors, in the type of the inputs."""
        if not self.stored.shape[2]:
            return self.newest
        if isinstance(self.format, TokenBlocks):
            return torch.cat([unpack_blocks(self.stored, self.format, self.width).to(self.dtype), self.newest], 2)
        return dequantize_heads(from_bytes(self.stored, self.format, self.width)).to(self.dtype)

    def crop(self, tokens: int) -> None:
        """Keep the first tokens; the rest of a partial block becomes dequantized floats again."""
        if isinstance(self.format, TokenBlocks):
            filled, kept = whole(tokens, self.format), self.read()[:, :, :tokens]
            inside = filled <= self.stored.shape[2] * self.format.tokens
            self.stored = self.stored[:, :, : filled // self.format.tokens] if inside else self.stored
            self.newest = kept[:, :, self.stored.shape[2] * self.format.tokens :]
        else:
            self.stored = self.stored[:, :, :tokens]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the first dimension, texts, or the device."""
        self.stored, self.newest = change(self.stored), change(self.newest)
