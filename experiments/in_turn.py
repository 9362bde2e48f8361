"""Mixed allocations without a search: assign schemes to layers round-robin."""

from collections.abc import Sequence

from mpq.core.layer import Layer


def in_turn(layers: Sequence[Layer], schemes: Sequence[str]) -> list[str]:
    """A scheme for each layer, round-robin over groups of tied layers."""
    keys = list(dict.fromkeys(layer.tie or layer.name for layer in layers))
    turn = {key: schemes[index % len(schemes)] for index, key in enumerate(keys)}
    return [turn[layer.tie or layer.name] for layer in layers]
