"""Re-estimation of batch normalization's running means after the weights were rounded.

Rounding shifts the means of the layers' outputs, which additive scores do not model. One pass over a few hundred images
with batch statistics estimates the new means. Variances are kept: re-estimating them harms above about 2.5 bits.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpq.network.calibration import Batch, LossFn, evaluating, first_samples, samples_in
from mpq.network.copies import copied

SAMPLES = 512


def stored_means(model: nn.Module) -> dict[str, Tensor]:
    """The running means in use, by module name; empty for a network without batch normalization."""
    return {
        name: module.running_mean
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def estimate_means(
    model: nn.Module, batches: Sequence[Batch], forward: LossFn, samples: int = SAMPLES
) -> dict[str, Tensor]:
    """Means of the inputs of every batch normalization, (channels,) by module name; the model is left unchanged.

    The first `samples` samples pass with batch statistics, so that each mean is measured after corrected earlier
    means. Batches of one sample are skipped.
    """
    norms = {name: model.get_submodule(name) for name in stored_means(model)}
    used = [part for part in first_samples(batches, samples) if samples_in(part) > 1]
    if not norms or not used:
        return {}
    before = {name: (module.momentum, copy.deepcopy(module._buffers)) for name, module in norms.items()}
    with evaluating(model):
        try:
            for module in norms.values():
                module.train()
                module.momentum = None  # type: ignore[assignment]
                module.reset_running_stats()  # type: ignore[operator]
            for batch in used:
                forward(model, batch)
            return {name: mean.clone() for name, mean in stored_means(model).items()}
        finally:
            for name, module in norms.items():
                module.eval()
                module.momentum, buffers = before[name]
                for key, buffer in buffers.items():
                    if buffer is not None:
                        getattr(module, key).copy_(buffer)


@torch.no_grad()
def put_means(model: nn.Module, means: Mapping[str, Tensor]) -> None:
    """Set running means of a model in place."""
    for name, mean in means.items():
        stored: Tensor = model.get_submodule(name).running_mean  # type: ignore[assignment]
        stored.copy_(mean)


def with_means(model: nn.Module, means: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with these running means, sharing all parameters; the model itself when `means` is empty."""
    if not means:
        return model
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    corrected = copied(model, shared)
    put_means(corrected, means)
    return corrected
