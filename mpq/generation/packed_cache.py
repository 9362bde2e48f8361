"""A cache of transformers that stores keys and values as bytes of their formats."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mpq.core.cache import TokenBlocks
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import KEYS, VALUES
from mpq.generation.stored_vectors import StoredVectors
from mpq.kernels.kv_cache import dequantize_heads, from_bytes, quantize_heads, to_bytes
from mpq.network.cached import entry_name
from mpq.network.transformers_cache import ChangingCache
from mpq.quantized import CacheRounding


class PackedCache(ChangingCache):
    """transformers' own growing cache, whose tensors are uint8 (batch, heads, tokens, bytes of a vector).

    All operations of transformers on a cache (windows, beams, cropping, offloading) work on the bytes. Attention
    dequantizes all vectors at each step: this is the plain reference, exact in memory and slow. Layers with blocks of
    tokens are `StoredLayer`s.
    """

    def __init__(self, config: Any, formats: CacheFormats) -> None:
        super().__init__(config, CacheRounding(formats))
        self.formats = formats.format_of
        for index, layer in enumerate(self.layers):
            pair = [self.formats.get(entry_name(index, kind)) for kind in (KEYS, VALUES)]
            if not any(isinstance(format, TokenBlocks) for format in pair):
                continue
            if type(layer) is not DynamicLayer or pair[0] is None or pair[1] is None:
                raise MpqError(f"layer {index} keeps a {type(layer).__name__}, which holds no blocks of tokens")
            self.layers[index] = StoredLayer(pair[0], pair[1])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values so far, dequantized, in the type of the inputs."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, StoredLayer):
            return layer.update(key_states, value_states)
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
        return sum(part.nbytes for part in parts if isinstance(part, Tensor | StoredVectors))


class StoredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a growing cache with keys or values in blocks of tokens."""

    keys: Any
    values: Any

    def __init__(self, keys: Format, values: Format) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formats = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            StoredVectors(format, one) for format, one in zip(self.formats, (key_states, value_states), strict=True)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, as they are read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.append(key_states)
        self.values.append(value_states)
        return self.keys.read(), self.values.read()

    def get_seq_length(self) -> int:
        """Tokens that are cached."""
        return self.keys.tokens if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many of the newest tokens (a negative number)."""
        for part in self._parts():
            part.crop(part.tokens - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder texts for beam search."""
        for part in self._parts():
            part.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        for part in self._parts():
            part.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts."""
        for part in self._parts():
            part.map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move to main memory."""
        for part in self._parts():
            part.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device."""
        for part in self._parts():
            part.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _parts(self) -> tuple[StoredVectors, ...]:
        return (self.keys, self.values) if self.is_initialized else ()
