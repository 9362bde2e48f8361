"""Blocks of tokens in which each column of a head has its own scale (`mpq.core.cache.TokenBlocks`), as bytes."""

from torch import Tensor

from mpq.core.cache import TokenBlocks
from mpq.kernels.kv_cache import dequantize_heads, from_bytes, quantize_heads, round_vectors, to_bytes


def columns(vectors: Tensor, format: TokenBlocks) -> Tensor:
    """Vectors of whole blocks, (batch, heads, tokens, width), as (batch, heads * blocks, width, tokens of a block)."""
    batch, heads, tokens, width = vectors.shape
    blocks = vectors.reshape(batch, heads * (tokens // format.tokens), format.tokens, width)
    return blocks.transpose(2, 3)


def vectors_of(columns: Tensor, heads: int) -> Tensor:
    """The inverse of `columns`."""
    batch, blocks, width, tokens = columns.shape
    return columns.transpose(2, 3).reshape(batch, heads, blocks // heads * tokens, width)


def whole(tokens: int, format: TokenBlocks) -> int:
    """Number of first tokens that fill blocks."""
    return tokens // format.tokens * format.tokens


def round_blocks(vectors: Tensor, format: TokenBlocks) -> Tensor:
    """A whole text's vectors as a cache returns them; the newest, which do not fill a block, are unchanged."""
    filled = whole(vectors.shape[2], format)
    rounded = vectors.detach().clone()
    if filled:
        changed = round_vectors(columns(vectors.detach()[:, :, :filled], format), format.within)
        rounded[:, :, :filled] = vectors_of(changed, vectors.shape[1])
    return rounded


def pack_blocks(vectors: Tensor, format: TokenBlocks) -> Tensor:
    """Vectors of whole blocks as bytes: uint8 (batch, heads, blocks, bytes of a block)."""
    batch, heads, tokens, width = vectors.shape
    stored = to_bytes(quantize_heads(columns(vectors, format), format.within))
    return stored.reshape(batch, heads, tokens // format.tokens, format.block_bytes(width))


def unpack_blocks(stored: Tensor, format: TokenBlocks, width: int) -> Tensor:
    """The inverse, float32 (batch, heads, tokens, width)."""
    batch, heads, blocks, size = stored.shape
    rows = stored.reshape(batch, heads * blocks, width, size // width)
    return vectors_of(dequantize_heads(from_bytes(rows, format.within, format.tokens)), heads)
