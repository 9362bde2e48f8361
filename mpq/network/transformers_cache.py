"""A cache of transformers that applies a function to keys and values before it stores them."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from mpq.core.layer import KEYS, VALUES
from mpq.network.cached import Change, entry_name


class ChangingCache(DynamicCache):
    """transformers' own growing cache for a model's config, of changed keys and values."""

    def __init__(self, config: Any, change: Change) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        self.change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values so far, the new ones changed."""
        keys = self.change(entry_name(layer_idx, KEYS), key_states)
        values = self.change(entry_name(layer_idx, VALUES), value_states)
        pair: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return pair


def windows_of(config: Any) -> dict[str, int]:
    """Tokens that a layer's cache keeps, by its index as text; layers that keep all are left out."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    kept = {str(index): getattr(layer, "sliding_window", None) for index, layer in enumerate(layers)}
    return {index: int(window) for index, window in kept.items() if window}
