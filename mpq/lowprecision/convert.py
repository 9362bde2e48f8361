"""Models whose linear layers and convolutions train in few bits.

Weights stay in full precision (the master copy). A convolution is the product of its unfolded inputs with its weight
matrix; gradients of overlapping windows are added in full precision.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.patterns import match_names
from mpq.lowprecision.loss_scale import DynamicScale
from mpq.lowprecision.products import AnyRecipe, products
from mpq.lowprecision.recipe import DYNAMIC, Recipe
from mpq.network.calibration import seeded
from mpq.network.layers import input_matrix, layer_kind, own_code, weight_matrix

log = logging.getLogger(__name__)


class LowPrecisionLayer(nn.Module):
    """A layer whose three products run by a recipe; parameters, names and hooks are those of the layer it replaces."""

    recipe: AnyRecipe
    stream: int  # seed of the layer's own random numbers
    dynamic: DynamicScale | None  # loss scale, where the recipe's is dynamic; checkpoints do not hold it
    _generators: dict[torch.device, torch.Generator]

    def generator(self, device: torch.device) -> torch.Generator:
        """The layer's own source of random numbers on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.stream)
        return self._generators[device]

    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return weight_matrix(self)

    def biased(self, outputs: Tensor) -> Tensor:
        """The outputs (..., out) with the bias, added in full precision."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return outputs if bias is None else outputs + bias

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The product of (rows, in) with (out, in) by the recipe, in the inputs' type."""
        with torch.autocast(rows.device.type, enabled=False):  # rounded operands are multiplied as they are
            return products(rows, weight, self.recipe, self.generator(rows.device), self.dynamic).to(rows.dtype)


class _LowPrecisionMatrix(LowPrecisionLayer):
    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out); the bias is added in full precision."""
        outputs = self.biased(self.multiply(input.reshape(-1, input.shape[-1]), self.matrix()))
        return outputs.view(*input.shape[:-1], -1)


class LowPrecisionLinear(_LowPrecisionMatrix, nn.Linear):
    """A linear layer."""


class LowPrecisionConv1D(_LowPrecisionMatrix):
    """A linear layer of transformers' GPT-2, whose weight is (in, out)."""

    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return weight_matrix(self).t()


class _LowPrecisionConv(LowPrecisionLayer):
    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, *size) or without the batch, to the same with the size of the outputs."""
        assert isinstance(self, (nn.Conv1d, nn.Conv2d))
        spatial = len(self.kernel_size)
        if input.dim() == spatial + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        columns = input_matrix(self, input)
        groups = columns if self.groups > 1 else columns.unsqueeze(0)
        weights = self.matrix().chunk(self.groups)
        parts = [self.multiply(rows, one) for rows, one in zip(groups, weights, strict=True)]
        outputs = self.biased(torch.cat(parts, 1))
        return outputs.view(len(input), *self._output_size(input), -1).movedim(-1, 1)

    def _output_size(self, input: Tensor) -> list[int]:
        assert isinstance(self, (nn.Conv1d, nn.Conv2d))
        padding = self._reversed_padding_repeated_twice[::-1]
        return [
            (size + sum(padding[2 * i : 2 * i + 2]) - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i, size in enumerate(input.shape[2:])
        ]


class LowPrecisionConv1d(_LowPrecisionConv, nn.Conv1d):
    """A one-dimensional convolution."""


class LowPrecisionConv2d(_LowPrecisionConv, nn.Conv2d):
    """A two-dimensional convolution."""


KINDS: dict[str | None, type[LowPrecisionLayer]] = {
    "linear": LowPrecisionLinear, "transformers-conv1d": LowPrecisionConv1D,
    "conv1d": LowPrecisionConv1d, "conv2d": LowPrecisionConv2d,
}  # fmt: skip


def convert(
    model: nn.Module,
    recipe: AnyRecipe | str,
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Replace the model's linear layers and convolutions, in place, by layers of the recipe; return the model.

    Parameters, their names and hooks stay: optimizers, checkpoints and training loops need no change. A model that was
    converted before gets the new recipe. Layers with a custom `forward`, embeddings, transposed and 3-D convolutions
    keep full precision.

    Args:
        model: changed in place. Usually without the output layer: exclude=("head",).
        recipe: of all replaced layers; a format's name means `Recipe(name)`.
        include: patterns of the layers' names.
        exclude: patterns of layers to leave alone.
        seed: of stochastic rounding and rotations; each layer has its own stream, derived from its name.

    Raises:
        MpqError: no layer to convert, or a pattern that matches none.
    """
    recipe = Recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = chosen_layers(model, include, exclude)
    converted: dict[int, nn.Module] = {}
    for name, module in chosen.items():
        if id(module) not in converted:
            converted[id(module)] = _converted(module, recipe, seeded(seed, "low precision", name).initial_seed())
        model.set_submodule(name, converted[id(module)])
    return model


def chosen_layers(model: nn.Module, include: str | Iterable[str], exclude: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `convert` replaces, by name; MpqError as there."""
    candidates = convertible(model)
    if not candidates:
        raise MpqError(
            f"{type(model).__name__} has no linear layer or convolution to train in few bits: a single layer needs a "
            "module around it"
        )
    left_out, included = set(match_names(exclude, list(candidates))), match_names(include, list(candidates))
    others = [name for name, module in model.named_modules() if layer_kind(module) not in (None, "embedding")]
    if others := [name for name in others if name and name not in candidates]:
        log.info("kept in full precision, as their kind has no low-precision form: %s", ", ".join(others))
    return {name: candidates[name] for name in included if name not in left_out}


def convertible(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `convert` can replace, by name; a module with several names under each."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (isinstance(module, LowPrecisionLayer) or (layer_kind(module) in KINDS and not own_code(module)))
    }


def _converted(module: nn.Module, recipe: AnyRecipe, stream: int) -> LowPrecisionLayer:
    kind = type(module) if isinstance(module, LowPrecisionLayer) else KINDS[layer_kind(module)]
    layer = kind.__new__(kind)
    dynamic = DynamicScale() if isinstance(recipe, Recipe) and recipe.loss_scale == DYNAMIC else None
    vars(layer).update(vars(module), recipe=recipe, stream=stream, dynamic=dynamic, _generators={})
    return layer


@contextmanager
def converted(model: nn.Module, recipe: AnyRecipe | str, **options: Any) -> Iterator[nn.Module]:
    """Inside the block the model computes as after `convert`, forward and backward; its layers are restored after."""
    layers = convertible(model)
    try:
        yield convert(model, recipe, **options)
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
