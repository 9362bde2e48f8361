"""Fake quantization: layers compute in a scheme that can change at any step, on trainable float weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError, nearest_names
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calls import call_input, with_call_input
from mpq.network.layers import matrix_to_weight, weight_matrix
from mpq.rounding import METHODS, method_named
from mpq.rounding.activations import fake_quantize_inputs, straight_through
from mpq.rounding.codes import round_scales, snap
from mpq.rounding.learned import GridRounding, learnable
from mpq.rounding.mixed import in_format
from mpq.rounding.reference import Quantized, dequantize
from mpq.rounding.store import Finished, MethodRounder


class FakeQuantization(nn.Module):
    """Quantizes the layers of a model during the forward pass, by hooks.

    Layers are not quantized until `use` sets schemes. The model's parameters and state do not change, so its optimizer
    and checkpoints still work; this module holds learned scales (its parameters) and ranges of activations (its
    buffers).

    An activation format with one scale for the tensor clips to a moving average of the largest magnitude, which only
    layers in training mode update; scales per token or group are dynamic.

    Args:
        model: the model that holds the layers.
        layers: the layers that may be quantized.
        method: of weight scales, recomputed at every step: a name of `mpq.rounding.METHODS` that needs no second
            moments.
        learned: formats whose scales are parameters instead, for every layer, where formats have scales that can be
            (`mpq.rounding.learned`).
        decay: of the moving average, per forward pass.

    Raises:
        MpqError: a layer with a computed weight (a parametrization), or a method that needs second moments.
    """

    ranges: Tensor

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        method: str = "nearest",
        learned: Iterable[Format] = (),
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if METHODS.named(method).second_moment:
            raise MpqError(
                f"the method {method} needs the layers' inputs, which change in training: use nearest or mse"
            )
        self.layers, self.decay, self.method = tuple(layers), decay, method
        self._choose = method_named(method)
        self.schemes: dict[str, Scheme] = {}  # by layer name; a layer without one is not quantized
        self.masks: dict[str, Tensor] = {}  # by layer name
        self.register_buffer("ranges", torch.full((len(self.layers),), torch.nan, dtype=torch.float32))
        self.learned = nn.ModuleList()
        formats = tuple(format for format in dict.fromkeys(learned) if learnable(format))
        self._modules_of = [[model.get_submodule(name) for name in layer.names] for layer in self.layers]
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        for index, modules in enumerate(self._modules_of):
            if any("weight" not in module._parameters for module in modules):
                raise MpqError(
                    f"the weight of {self.layers[index].name} is computed (a parametrization): remove what computes it"
                )
            matrix = weight_matrix(modules[0]).detach()
            scales = {format.name: GridRounding(method_named("mse")(matrix, format, None), True) for format in formats}
            self.learned.append(nn.ModuleDict(scales))
        for index, modules in enumerate(self._modules_of):
            for module in dict.fromkeys(modules):
                self.handles += self._attach(index, module)

    def use(self, schemes: Mapping[str, Scheme], masks: Mapping[str, Tensor] | None = None) -> None:
        """Set the schemes of these layers, by name; all others are not quantized.

        A layer's mask, which broadcasts to its matrix (rows, cols), multiplies the weight before it is rounded.

        Raises:
            MpqError: an unknown layer.
        """
        names = {layer.name for layer in self.layers}
        for name in schemes.keys() - names:
            raise MpqError(f"unknown layer {name!r}: {nearest_names(name, names)}")
        self.schemes, self.masks = dict(schemes), dict(masks or {})

    def remove(self) -> None:
        """Remove the hooks, and with them the quantization."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @torch.no_grad()
    def bake(self) -> None:
        """Write the rounded weights into the model, and remove the hooks."""
        for index, (layer, modules) in enumerate(zip(self.layers, self._modules_of, strict=True)):
            if layer.name in self.schemes:
                module = modules[0]
                weight: Tensor = module.weight  # type: ignore[assignment]
                weight.copy_(self._weight(index, module, self.schemes[layer.name].weight))
        self.remove()

    def rounder(self) -> Finished:
        """A rounder that returns the layers' current rounded weights, learned scales included, for exports."""
        states = {
            layer.name: self._quantized(
                index, self._matrix(index, modules[0]).detach(), self.schemes[layer.name].weight
            )
            for index, (layer, modules) in enumerate(zip(self.layers, self._modules_of, strict=True))
            if layer.name in self.schemes
        }
        return Finished(f"{self.method}, trained", states, MethodRounder(self.method))

    def _attach(self, index: int, module: nn.Module) -> tuple["torch.utils.hooks.RemovableHandle", ...]:
        name = self.layers[index].name

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            scheme = self.schemes.get(name)
            if scheme is None:
                return None
            # An entry of the instance's dictionary shadows the parameter of the same name during this forward pass.
            module.__dict__["weight"] = self._weight(index, module, scheme.weight)
            if scheme.activation is None or isinstance(module, nn.Embedding):
                return None
            inputs = self._used(index, module, call_input(args, kwargs))
            rounded = self._inputs(index, module, inputs, scheme.activation)
            return with_call_input(args, kwargs, rounded)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            module.__dict__.pop("weight", None)

        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        )

    def _weight(self, index: int, module: nn.Module, format: Format) -> Tensor:
        matrix, learned = self._matrix(index, module), self._learned_in(index, format)
        if learned is not None:
            rounded: Tensor = learned(matrix)
        else:
            rounded = straight_through(matrix, lambda weight: dequantize(self._quantized(index, weight, format)))
        return matrix_to_weight(rounded.to(matrix.dtype), module)

    def _quantized(self, index: int, matrix: Tensor, format: Format) -> Quantized:
        learned = self._learned_in(index, format)
        return in_format(self._choose, matrix.detach(), format) if learned is None else learned.quantized(matrix)

    def _matrix(self, index: int, module: nn.Module) -> Tensor:
        matrix, mask = weight_matrix(module), self.masks.get(self.layers[index].name)
        return matrix if mask is None else matrix * mask.to(matrix)

    def _used(self, index: int, module: nn.Module, inputs: Tensor) -> Tensor:
        """The inputs with masked channels set to zero, so that they do not affect scales."""
        mask = self.masks.get(self.layers[index].name)
        if mask is None:
            return inputs
        if not isinstance(module, nn.Conv2d):
            return inputs * mask[0].to(inputs)
        channels = mask.view(module.in_channels // module.groups, -1).amax(1)
        return inputs if module.groups > 1 else inputs * channels.view(-1, 1, 1).to(inputs)

    def _learned_in(self, index: int, format: Format) -> GridRounding | None:
        learned = self.learned[index]
        assert isinstance(learned, nn.ModuleDict)
        return next((one for name, one in learned.items() if name == format.name), None)  # type: ignore[return-value]

    def _inputs(self, index: int, module: nn.Module, inputs: Tensor, format: Format) -> Tensor:
        if format.granularity != "tensor":
            return straight_through(inputs, lambda values: fake_quantize_inputs(module, values, format))
        with torch.no_grad():
            low, high = inputs.detach().aminmax()
            largest = torch.maximum(-low, high).float()
            if not bool(torch.isfinite(largest)):
                raise MpqError(f"the inputs of {self.layers[index].name} hold NaN or infinite numbers")
            known = torch.where(self.ranges[index].isnan(), largest, self.ranges[index])
            if module.training:
                known = self.decay * known + (1 - self.decay) * largest
                self.ranges[index] = known
            scale = round_scales(known / format.grid.max, format.scale)

        def rounding(values: Tensor) -> Tensor:
            return snap(values / scale, format.grid).mul_(scale).to(values.dtype)

        limit = known.to(inputs.dtype)
        return straight_through(inputs.clamp(-limit, limit), rounding)
