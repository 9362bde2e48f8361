"""Batch normalization in quantization-aware training: frozen, then folded into the layer before it (HAWQ-V3)."""

from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, evaluating
from mpq.network.calls import call_input
from mpq.network.layers import layer_kind, own_code, weight_matrix

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def freeze_batchnorm(model: nn.Module) -> tuple["torch.utils.hooks.RemovableHandle", ...]:
    """Let batch normalizations use their stored statistics in every mode.

    Their weights and biases still train. Remove the returned handles to undo it.
    """

    def evaluate(module: nn.Module, args: tuple[Any, ...]) -> None:
        module.training = False

    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    return tuple(norm.register_forward_pre_hook(evaluate) for norm in norms)


@torch.no_grad()
def fold_batchnorm(model: nn.Module, batch: Batch, forward: LossFn) -> tuple[str, ...]:
    """Fold each batch normalization into the preceding convolution or linear layer, in place.

    Outputs in evaluation mode do not change. Pairs are found by one forward pass over the batch. The layer gets a bias,
    the normalization becomes an identity.

    Returns:
        Names of the changed layers.

    Raises:
        MpqError: a normalization not preceded by a layer or without statistics, or a layer that is used twice.
    """
    pairs = _pairs(model, batch, forward)
    for name, norm_name in pairs.items():
        _fold(model.get_submodule(name), model.get_submodule(norm_name))
        parent, _, leaf = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    return tuple(pairs)


def _pairs(model: nn.Module, batch: Batch, forward: LossFn) -> dict[str, str]:
    producers: list[tuple[Tensor, str]] = []  # kept alive, so that ids of outputs are unique
    pairs: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}

    def produced(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        producers.append((output, names[module]))

    def consumed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = call_input(args, kwargs)
        producer_names = [name for output, name in producers if output is inputs]
        if not producer_names:
            raise MpqError(f"batch normalization {names[module]} does not follow a layer: it cannot be folded")
        if pairs.get(producer_names[0], names[module]) != names[module]:
            raise MpqError(f"layer {producer_names[0]} feeds two batch normalizations: they cannot be folded into it")
        pairs[producer_names[0]] = names[module]

    handles = []
    for module in names:
        if isinstance(module, NORMS):
            handles.append(module.register_forward_pre_hook(consumed, with_kwargs=True))
        elif layer_kind(module) in ("linear", "conv1d", "conv2d") and not own_code(module):
            handles.append(module.register_forward_hook(produced))
    try:
        with evaluating(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    counts = [name for _, name in producers]
    for name in pairs:
        if counts.count(name) > 1:
            raise MpqError(f"layer {name} is used {counts.count(name)} times: nothing can be folded into it")
    return pairs


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(norm, NORMS)
    if norm.running_mean is None or norm.running_var is None:
        raise MpqError("a batch normalization without stored statistics cannot be folded: track them in training first")
    gain = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight
    shift = -norm.running_mean * gain
    if norm.bias is not None:
        shift = shift + norm.bias
    weight_matrix(layer).mul_(gain.unsqueeze(1))
    old: Tensor | None = layer.bias  # type: ignore[assignment]
    layer.bias = nn.Parameter(shift if old is None else old * gain + shift)
