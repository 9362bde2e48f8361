"""A cache of transformers that stores keys and values as bytes of their formats."""

from typing import Any

from torch import Tensor

from mpq.core.cache import CacheFormats
from mpq.core.layer import KEYS, VALUES
from mpq.kernels.kv_cache import dequantize_heads, from_bytes, quantize_heads, to_bytes
from mpq.network.cached import entry_name
from mpq.network.transformers_cache import ChangingCache
from mpq.quantized import CacheRounding


class PackedCache(ChangingCache):
    """transformers' own growing cache, whose tensors are uint8 (batch, heads, tokens, bytes of a vector).

    Whatever transformers does with a cache (windows, beams, cropping, offloading) works on the bytes. What attention
    reads is dequantized at each step: this is the plain reference, exact in memory and slow.
    """

    def __init__(self, config: Any, formats: CacheFormats) -> None:
        super().__init__(config, CacheRounding(formats))
        self.formats = formats.format_of

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values so far, read back from their formats, in the type they came in."""
        new = {entry_name(layer_idx, KEYS): key_states, entry_name(layer_idx, VALUES): value_states}
        if not new.keys() <= self.formats.keys():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        first, second = (to_bytes(quantize_heads(vectors, self.formats[name])) for name, vectors in new.items())
        held = super(ChangingCache, self).update(first, second, layer_idx, *args, **kwargs)
        keys, values = (
            dequantize_heads(from_bytes(one, self.formats[name], vectors.shape[-1])).to(vectors.dtype)
            for one, (name, vectors) in zip(held, new.items(), strict=True)
        )
        return keys, values

    @property
    def nbytes(self) -> int:
        """Stored bytes of all layers."""
        parts = (getattr(layer, name, None) for layer in self.layers for name in (KEYS, VALUES))
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))
