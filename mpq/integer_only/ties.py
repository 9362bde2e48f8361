"""Ties of residual networks: layers that must agree on the precision of activations (HAWQ-V3, section 3)."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from mpq.core.layer import Layer
from mpq.integer_only.trace import LAYERS, NORM, layer_of, operation, source_of, traced


def residual_ties(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> tuple[Layer, ...]:
    """The layers, tied where they read the same values or where their outputs are added.

    As the first convolution of a block and that of its shortcut in HAWQ-V3's published problems. Batch normalization
    may stand between a layer and the addition. Layers that are tied already keep their tie.

    Raises:
        MpqError: PyTorch cannot export the network.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    readers: dict[fx.Node, list[str]] = {}
    for node in traced(model, images).graph.nodes:
        if operation(node) in LAYERS:
            readers.setdefault(source_of(node.args[0]), []).append(layer_of(node))
        elif operation(node).startswith("aten.add"):
            producers = [_producer(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)]
            readers[node] = [name for name in producers if name] if all(producers) else []
    for first, *others in filter(None, readers.values()):
        for other in others:
            parent[root(other)] = root(first)
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(root(layer.name), []).append(layer.name)
    return tuple(
        replace(layer, tie=f"residual {root(layer.name)}")
        if not layer.tie and len(members[root(layer.name)]) > 1
        else layer
        for layer in layers
    )


def _producer(node: fx.Node) -> str:
    """The layer whose output this is, "" where it is no layer's."""
    node = source_of(node)
    if operation(node) == NORM:
        node = source_of(node.args[0])
    return layer_of(node) if operation(node) in LAYERS else ""
