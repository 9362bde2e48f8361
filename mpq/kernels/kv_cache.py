"""Cached keys and values in formats of `mpq.core.cache`: storage, and the plain reference of attention over it.

Nothing is calibrated: tokens are rounded as they arrive, each head's vector separately (TurboMind, arXiv 2508.15601).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.cache import TokenBlocks, affine, cache_name
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.kernels.layout import Packed, pack, unpack
from mpq.rounding.codes import COPY_DTYPES, SCALE_DTYPES, to_float_copy
from mpq.rounding.reference import Quantized, dequantize, quantize

NAN_CODE = 0x7F  # e4m3 and e5m2
NAN_SCALES = {"e8m0": 0xFF, "e4m3": NAN_CODE, "ue5m3": 0xFF}  # codes of NaN in scales stored as bytes


@dataclass(frozen=True)
class Heads:
    """Vectors of heads and tokens: (batch, heads, tokens, width). A number is code * scale + zero.

    Of float copies, `codes` are the numbers themselves, (batch, heads, tokens, width); a cast to fp8 has no scales.
    """

    format: Format
    width: int
    codes: Tensor  # uint8 (batch, heads, tokens, ceil(width * bits / 8)), little-endian bit streams
    scale: Tensor | None = None  # (batch, heads, tokens, groups): float16, or uint8 codes of e8m0 and e4m3
    zero: Tensor | None = None  # float16, as scale; of formats that have a minimum

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    @property
    def tokens(self) -> int:
        """Tokens of each head."""
        return self.codes.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, and scale and zero where the format has them."""
        return tuple(tensor for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Heads":
        """The same with other tensors, in the order of `tensors`."""
        return Heads(self.format, self.width, *tensors)


def quantize_heads(vectors: Tensor, format: Format | int) -> Heads:  # float (batch, heads, tokens, width)
    """Round each vector to the nearest values of the format, ties to even; an integer means `affine` with these bits.

    A group with NaN or infinity is read back as NaN, if the type of the scale or the element has one.

    Raises:
        MpqError: bits are not between 1 and 8, or the vectors have other than four axes.
    """
    if isinstance(format, TokenBlocks):
        raise MpqError(f"{format.name} rounds blocks of tokens, not vectors: see mpq.kernels.token_blocks")
    if vectors.ndim != 4 or (isinstance(format, int) and not 1 <= format <= 8):
        asked = f"{format} bits" if isinstance(format, int) else cache_name(format)
        raise MpqError(f"invalid cache: expected 4 dimensions and 1 to 8 bits, not {tuple(vectors.shape)} and {asked}")
    format = affine(format) if isinstance(format, int) else format
    leading, width = vectors.shape[:3], vectors.shape[3]
    matrix = vectors.detach().reshape(-1, width)
    if format.is_float_copy:
        return Heads(format, width, to_float_copy(vectors.detach(), format.grid.name))
    bad = ~torch.isfinite(matrix)
    return _heads(_with_nan(pack(_rounded(matrix.masked_fill(bad, 0), format)), bad), leading)


def _rounded(matrix: Tensor, format: Format) -> Quantized:
    """Finite vectors (rows, width), each with its own scales."""
    one = torch.ones((), device=matrix.device, dtype=torch.float32)
    scales = one.reshape(1, 1) if format.granularity == "tensor" else None
    return quantize(matrix, format, scales=scales, tensor_scale=one if format.tensor_scale else None)


def _with_nan(packed: Packed, bad: Tensor) -> Packed:
    """The packed vectors with NaN for groups that have a bad number; (rows, width)."""
    format, tensors = packed.format, dict(packed.tensors)
    if format.granularity != "tensor":
        missing = -bad.shape[1] % max(format.group_size, 1)
        groups = functional.pad(bad, (0, missing)).reshape(len(bad), format.groups(bad.shape[1]), -1).any(-1)
        tensors["scale"] = tensors["scale"].masked_fill(groups, NAN_SCALES.get(format.scale, torch.nan))
    elif format.grid.specials != "none":
        tensors["packed"] = tensors["packed"].masked_fill(bad, NAN_CODE)
    return replace(packed, tensors=tensors)


def _heads(packed: Packed, leading: torch.Size) -> Heads:
    names = ("packed", "scale", "minimum") if packed.format.granularity != "tensor" else ("packed",)
    shaped = [packed.tensors[name].reshape(*leading, -1) for name in names if name in packed.tensors]
    return Heads(packed.format, packed.shape[1], *shaped)


def dequantize_heads(heads: Heads) -> Tensor:
    """The vectors, float32 (batch, heads, tokens, width)."""
    format, leading = heads.format, heads.codes.shape[:3]
    if format.is_float_copy:
        return heads.codes.float()
    names = ("packed", "scale", "minimum")
    tensors = {name: tensor.flatten(0, 2) for name, tensor in zip(names, heads.tensors, strict=False)}
    one = torch.ones((), device=heads.codes.device, dtype=torch.float32)
    if format.granularity == "tensor":
        tensors["scale"] = one.reshape(1, 1)
    if format.tensor_scale:
        tensors["tensor_scale"] = one
    rows = len(tensors["packed"])
    return dequantize(unpack(Packed(format, (rows, heads.width), tensors=tensors))).reshape(*leading, heads.width)


def round_vectors(vectors: Tensor, format: Format) -> Tensor:
    """Vectors as a cache of this format returns them (batch, heads, tokens, width), in their own type.

    Of blocks of tokens, for a text from its beginning.
    """
    if isinstance(format, TokenBlocks):
        from mpq.kernels.token_blocks import round_blocks

        return round_blocks(vectors, format)
    matrix = vectors.detach().reshape(-1, vectors.shape[-1])
    if format.is_float_copy or not bool(torch.isfinite(matrix).all()):
        return dequantize_heads(quantize_heads(vectors, format)).to(vectors.dtype)
    return dequantize(_rounded(matrix, format)).reshape(vectors.shape).to(vectors.dtype)  # the bytes are not needed


def to_bytes(heads: Heads) -> Tensor:
    """The stored bytes of each vector: uint8 (batch, heads, tokens, `head_bytes`)."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in heads.tensors], -1)


def from_bytes(stored: Tensor, format: Format, width: int) -> Heads:
    """The inverse of `to_bytes`."""
    if format.is_float_copy:
        return Heads(format, width, stored.contiguous().view(COPY_DTYPES[format.grid.name]))
    codes = -(-width * format.grid.bits // 8)
    kind = SCALE_DTYPES[format.scale]
    groups = format.groups(width) if format.granularity != "tensor" else 0
    sizes = [codes, groups * kind.itemsize, groups * 2 if format.minimum else 0]
    parts = zip(torch.split(stored, sizes, -1), (torch.uint8, kind, torch.float16), strict=True)
    return Heads(format, width, *(part.contiguous().view(dtype) for part, dtype in parts if part.shape[-1]))


def concatenate(parts: Sequence[Heads]) -> Heads:
    """Caches of the same heads one after the other along the tokens."""
    if len({(part.format, part.width) for part in parts}) != 1:
        raise MpqError("cannot join caches of different formats or widths")
    return parts[0].with_tensors([torch.cat(same, 2) for same in zip(*(part.tensors for part in parts), strict=True)])


def attention(
    query: Tensor | Heads,  # (batch, heads, tokens, width)
    keys: Tensor | Heads,  # (batch, key heads, past and present tokens, width); key heads divide heads
    values: Tensor | Heads,  # as keys
    causal: bool = True,
) -> Tensor:
    """Softmax attention with separate precisions of the operands: float32 (batch, heads, tokens, width).

    Causal: the last query sees all keys, each earlier one a key fewer. The plain reference: dequantize, multiply.
    """
    q, k, v = (dequantize_heads(part) if isinstance(part, Heads) else part.float() for part in (query, keys, values))
    if q.shape[1] % k.shape[1]:
        raise MpqError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    repeats = q.shape[1] // k.shape[1]
    tokens, past = q.shape[2], k.shape[2]
    mask = torch.ones(tokens, past, dtype=torch.bool, device=q.device).tril(past - tokens) if causal else None
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
