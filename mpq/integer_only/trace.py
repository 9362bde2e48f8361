"""The operations of a network as PyTorch exports them, and which layers read and produce which values."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.core.errors import MpqError, first_line
from mpq.network.calibration import evaluating

LAYERS = ("aten.conv1d.default", "aten.conv2d.default", "aten.linear.default")
NORM = "aten.batch_norm.default"
SAME = ("aten.dropout.default", "aten.alias.default", "aten.clone.default", "aten.contiguous.default")


def traced(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The network's graph for inputs like these, any number of them; parameters are attributes.

    Raises:
        MpqError: PyTorch cannot export the network.
    """
    batch = torch.export.Dim("batch")
    try:
        with evaluating(model), torch.no_grad():
            program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
            graph: fx.GraphModule = program.module(check_guards=False)
            return graph
    except Exception as error:
        raise MpqError(
            f"{type(model).__name__} cannot be traced for integers ({first_line(error)}): simplify forward"
        ) from error


def operation(node: fx.Node) -> str:
    """The name of a node's operation, "" for inputs and parameters."""
    return str(node.target) if node.op == "call_function" else ""


def arguments(node: fx.Node) -> list[Any]:
    """A node's arguments: nodes, numbers and lists of them."""
    return list(node.args)


def layer_of(node: fx.Node) -> str:
    """The name of the layer that a node is a product with."""
    return str(arguments(node)[1].target).rpartition(".")[0]


def source_of(node: Any) -> fx.Node:
    """The node whose values an argument holds, identities left out."""
    while operation(node) in SAME:
        node = node.args[0]
    last: fx.Node = node
    return last
