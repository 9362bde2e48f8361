"""Multiply-accumulates of a model and of its layers, from one forward pass."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, evaluating, samples_in
from mpq.network.layers import weight_matrix
from mpq.network.uses import seeing_uses


def count_macs(model: nn.Module, layers: Sequence[Layer], batch: Batch, forward: LossFn) -> tuple[Layer, ...]:
    """The layers with multiply-accumulates per sample (per sequence in a language model), from one forward pass.

    All uses of a shared weight count; embedding look-ups are free. A module with code of its own counts as its kind.
    """
    return count_all_macs(model, layers, batch, forward)[0]


def count_all_macs(
    model: nn.Module, layers: Sequence[Layer], batch: Batch, forward: LossFn
) -> tuple[tuple[Layer, ...], int]:
    """The layers with `count_macs`, and the whole model's multiply-accumulates: all matrix products, convolutions and
    attention that torch's FLOP counter covers.
    """
    counts = dict.fromkeys((layer.name for layer in layers), 0)

    def see(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        counts[name] += 0 if isinstance(module, nn.Embedding) else _macs(module, inputs, output)

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _WholeModel()
    seeing = seeing_uses(model, layers, see, inside=lambda module: False)
    with torch.no_grad(), evaluating(model), _in_parts(model), seeing, counter:
        forward(model, batch)
    samples = samples_in(batch)
    counted = tuple(replace(layer, macs=counts[layer.name] // samples) for layer in layers)
    return counted, counter.get_total_flops() // 2 // samples


@contextmanager
def _in_parts(model: nn.Module) -> Iterator[None]:
    """Inside the block an LSTM runs as products, which the counter sees, and not as one operation of oneDNN."""
    if not any(isinstance(module, nn.LSTM) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about flags that this build of torch lacks
        with torch.backends.mkldnn.flags(enabled=False):
            yield


class _WholeModel(ModuleTracker):
    """A module tracker that attributes everything to the whole model; tracking modules would hook into gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.parents = {"Global"}

    def __enter__(self) -> "_WholeModel":
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _macs(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    if isinstance(module, _ConvTransposeNd):  # every input is multiplied by the whole kernel
        return prod(inputs.shape) * module.weight[0].numel()
    return prod(output.shape) * weight_matrix(module).shape[1]
