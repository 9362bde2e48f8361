"""A cache of keys and values in low-bit integers, in TurboMind's style (arXiv 2508.15601; lmdeploy's `kv_quant`).

Every head of every token has its own float16 scale and zero: x is about code * scale + zero, with
scale = (max - min) / (2**bits - 1) and zero = min. Nothing is calibrated; tokens are rounded as they arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.kernels.layout import pack_bits, unpack_bits

_LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Heads:
    """Vectors of heads and tokens as codes: (batch, heads, tokens, width)."""

    bits: int
    width: int
    codes: Tensor  # uint8 (batch, heads, tokens, ceil(width * bits / 8)), little-endian bit streams
    scale: Tensor  # float16 (batch, heads, tokens)
    zero: Tensor  # float16, as scale

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes


def quantize_heads(vectors: Tensor, bits: int) -> Heads:  # float (batch, heads, tokens, width)
    """Round each vector to its own 2**bits steps from its smallest to its largest element.

    Raises:
        MpqError: bits are not between 1 and 8, or the vectors have other than four axes.
    """
    if not 1 <= bits <= 8 or vectors.ndim != 4:
        raise MpqError(
            f"invalid cache: expected 4 dimensions and 1 to 8 bits, not {tuple(vectors.shape)} and {bits} bits"
        )
    values = vectors.detach().float()
    low, high = values.amin(-1), values.amax(-1)
    zero = low.clamp(-_LIMIT, _LIMIT).half()
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(max=_LIMIT).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (values - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
    packed = pack_bits(codes.flatten(0, 2), bits).reshape(*codes.shape[:3], -1)
    return Heads(bits, values.shape[-1], packed, scale, zero)


def dequantize_heads(heads: Heads) -> Tensor:
    """The vectors, float32 (batch, heads, tokens, width)."""
    codes = unpack_bits(heads.codes.flatten(0, 2), heads.bits, heads.width).reshape(*heads.codes.shape[:3], heads.width)
    return codes.float() * heads.scale.float().unsqueeze(-1) + heads.zero.float().unsqueeze(-1)


def concatenate(parts: Sequence[Heads]) -> Heads:
    """Caches of the same heads one after the other along the tokens."""
    if len({(part.bits, part.width) for part in parts}) != 1:
        raise MpqError("cannot join caches of different bits or widths")
    codes, scale, zero = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("codes", "scale", "zero"))
    return Heads(parts[0].bits, parts[0].width, codes, scale, zero)


def attention(
    query: Tensor | Heads,  # (batch, heads, tokens, width)
    keys: Tensor | Heads,  # (batch, key heads, past and present tokens, width); key heads divide heads
    values: Tensor | Heads,  # as keys
    causal: bool = True,
) -> Tensor:
    """Softmax attention with each operand in a precision of its own: float32 (batch, heads, tokens, width).

    The last query sees the last key; earlier ones see as many keys fewer. The plain reference: dequantize, multiply.
    """
    q, k, v = (dequantize_heads(part) if isinstance(part, Heads) else part.float() for part in (query, keys, values))
    if q.shape[1] % k.shape[1]:
        raise MpqError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    repeats = q.shape[1] // k.shape[1]
    tokens, past = q.shape[2], k.shape[2]
    mask = torch.ones(tokens, past, dtype=torch.bool, device=q.device).tril(past - tokens) if causal else None
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
