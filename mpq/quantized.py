"""Models that compute in an allocation's formats: simulated in floating point and trainable, or from packed weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpq.core.allocation import Allocation, check_allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError, nearest_names
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.kernels.kv_cache import round_vectors
from mpq.kernels.layout import Packed, pack
from mpq.kernels.mixed import packed_weight
from mpq.kernels.modules import PackedLinear, packed_module
from mpq.kernels.stacked import Stack, stackable
from mpq.network.cached import change_cached
from mpq.network.calls import call_input, with_call_input
from mpq.network.copies import copied
from mpq.network.layers import FUSED, is_transposed, layer_kind, matrix_to_weight, own_code, shaped, weight_matrix
from mpq.network.prepare import prepared
from mpq.network.ranges import Ranges, static_scale
from mpq.rounding.activations import fake_quantize_inputs, straight_through
from mpq.rounding.learned import GridRounding
from mpq.rounding.reference import Quantized, dequantize
from mpq.rounding.store import Rounder, rounder_of

Moments = Mapping[str, Tensor]  # second moments of the layers' inputs, by layer name


def simulate(
    model: nn.Module,
    allocation: Allocation,
    method: str | Rounder = "mse",
    second_moments: Moments | None = None,
    *,
    trainable: bool = True,
    learned: bool = False,
    ranges: Ranges | None = None,
) -> nn.Module:
    """A copy of the model whose weights are rounded to their schemes, in the model's own floating-point types.

    Trainable, weights stay in full precision and are rounded to the scheme's grid, with the scales found at the start,
    whenever they are used; gradients pass rounding as if it were the identity (straight-through, arXiv 1308.3432).
    With `learned`, scales are parameters too (LSQ, `mpq.rounding.learned`). `mpq.export` writes the values of such a
    model without rounding them again. Otherwise the rounded weights simply replace the original ones: half the memory,
    faster, same outputs. A layer's inputs are rounded in both cases, with dynamic scales, or with a static scale for
    layers in `ranges` whose activations have one scale for the tensor, as in runtimes. Weights shared by several
    modules stay shared. The method is a name or a rounder: a `RoundingStore` rounds each layer once for each scheme and
    keeps the result for the next allocation.

    Raises:
        MpqError: the allocation's layers are not the model's, or a weight cannot be rounded (named).
    """
    model = prepared(model)
    if not trainable:
        rounded = quantized_layers(model, allocation, method, second_moments)
        simulated = simulate_rounded(
            model, ((layer, scheme, dequantize(matrix)) for layer, scheme, matrix in rounded), ranges
        )
        round_cache(simulated, allocation.cache)
        return simulated
    simulated = copied(model)
    rounder = rounder_of(method, second_moments)
    for layer, scheme, quantized in quantized_layers(simulated, allocation, rounder):
        modules = [simulated.get_submodule(name) for name in layer.names]
        rounding = WeightRounding(quantized, modules[0], learned, rounder.name)
        for holder, name in holders(simulated, modules[0].weight):  # type: ignore[arg-type]
            parametrize.register_parametrization(holder, name, rounding, unsafe=True)
        round_inputs(modules, scheme, (ranges or {}).get(layer.name))
    round_cache(simulated, allocation.cache)
    return simulated


def simulate_rounded(
    model: nn.Module, layers: Iterable[tuple[Layer, Scheme, Tensor]], ranges: Ranges | None = None
) -> nn.Module:
    """A copy of the model with these weight matrices, float32 (rows, cols), and inputs rounded by the schemes."""
    simulated = copied(prepared(model))
    for layer, scheme, matrix in layers:
        modules = [simulated.get_submodule(name) for name in layer.names]
        weight: Tensor = modules[0].weight  # type: ignore[assignment]
        with torch.no_grad():
            weight.copy_(matrix_to_weight(matrix, modules[0]))
        round_inputs(modules, scheme, (ranges or {}).get(layer.name))
    return simulated


def round_inputs(
    modules: Iterable[nn.Module], scheme: Scheme, span: Any = None
) -> list[torch.utils.hooks.RemovableHandle]:
    """Round the inputs of modules, except indices, to a scheme's activation format; returns the hooks.

    With `span`, the range of a layer's inputs, activations with one scale for the tensor use a static scale.
    """
    if scheme.activation is None:
        return []
    static = span is not None and scheme.activation.granularity == "tensor"
    rounding = InputRounding(scheme.activation, static_scale(scheme.activation, span) if static else None)
    users = [module for module in modules if not isinstance(module, nn.Embedding)]
    return [module.register_forward_pre_hook(rounding, with_kwargs=True) for module in users]


def round_cache(model: nn.Module, cache: CacheFormats | None) -> list[torch.utils.hooks.RemovableHandle]:
    """Round keys and values, straight-through, as the model caches them; returns the hooks. None: no rounding."""
    return [] if cache is None else change_cached(model, CacheRounding(cache))


class CacheRounding:
    """Rounds keys and values before they are cached."""

    def __init__(self, cache: CacheFormats) -> None:
        self.cache, self.format_of = cache, cache.format_of

    def __call__(self, name: str, vectors: Tensor) -> Tensor:
        """Vectors (batch, heads, tokens, width) of an entry, rounded."""
        format = self.format_of.get(name)
        return vectors if format is None else straight_through(vectors, lambda values: round_vectors(values, format))


def pack_model(
    model: nn.Module, allocation: Allocation, method: str | Rounder = "mse", second_moments: Moments | None = None
) -> nn.Module:
    """A copy of the model whose layers hold packed weights only and compute from them.

    Raises:
        MpqError: the allocation's layers are not the model's, or a weight cannot be rounded (named).
    """
    model = prepared(model)
    weights: dict[int, Any] = {}
    for layer, _ in checked_layers(model, allocation):
        weight = model.get_submodule(layer.name).weight
        weights[id(weight)] = weight  # shared with the copy until they are packed: the original is not copied
    packed = copied(model, weights)
    for layer, scheme, quantized in quantized_layers(packed, allocation, method, second_moments):
        put_packed(packed, layer, scheme, pack(quantized))
    return packed


def put_packed(
    model: nn.Module, layer: Layer, scheme: Scheme, packed: Packed, dtype: torch.dtype | None = None
) -> None:
    """Replace the modules of a layer, in place, by modules that compute from the packed weight.

    Modules with a custom `forward` and other holders of the weight stay and use the packed weight, which behaves as a
    tensor. `dtype` is the type of its dequantized values; by default the original weight's.
    """
    first = model.get_submodule(layer.name)
    original: Tensor = first.weight  # type: ignore[assignment]
    weight = packed_weight(packed, dtype or original.dtype, original.shape, is_transposed(layer.kind))
    weight.arrange()
    activation = None if scheme.activation is None else InputRounding(scheme.activation)
    for module in {model.get_submodule(name): None for name in layer.names}:
        if not own_code(module):
            put_module(model, module, packed_module(module, weight, scheme))
            continue
        delattr(module, "weight")
        module.weight = weight
        if activation is not None and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(activation, with_kwargs=True)
    for holder, name in holders(model, original):
        delattr(holder, name)
        setattr(holder, name, weight)


def put_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it occurs in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def holders(model: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """The modules that hold this parameter, and its name in each."""
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is weight
    ]


def fuse(model: nn.Module) -> nn.Module:
    """The packed model, changed in place: q/k/v and gate/up projections of one scheme are computed in one pass.

    Lossless: names, state dict and outputs do not change. Siblings with different formats, with rows that do not fill
    whole panels of 64, or with separate tensor scales are not joined, nor are any on a GPU. For self-attention: if q, k
    and v read different inputs, it is slower.
    """
    for parent in model.modules():
        for family in (family for families in FUSED.values() for family in families):
            children = [child for name, child in parent.named_children() if name in family]
            members = [child for child in children if isinstance(child, PackedLinear)]
            if members and len(members) == len(children) and stackable(members):
                stack = Stack(members)
                for member in members:
                    member.stack = stack
    return model


def quantized_layers(
    model: nn.Module, allocation: Allocation, method: str | Rounder, second_moments: Moments | None = None
) -> Iterator[tuple[Layer, Scheme, Quantized]]:
    """Every layer with its scheme and its rounded weight, one at a time."""
    rounder = rounder_of(method, second_moments)
    for layer, scheme in checked_layers(model, allocation):
        yield layer, scheme, rounder.quantized(layer, weight_matrix(model.get_submodule(layer.name)), scheme)


def checked_layers(model: nn.Module, allocation: Allocation) -> list[tuple[Layer, Scheme]]:
    """The allocation's layers with their schemes; MpqError when one of them is not the model's."""
    schemes, modules = check_allocation(allocation).scheme_of, dict(model.named_modules(remove_duplicate=False))
    for layer in allocation.layers:
        for name in layer.names:
            if name not in modules:
                raise MpqError(
                    f"the allocation names a layer {name} that the model lacks: {nearest_names(name, modules)}"
                )
            module = modules[name]
            shape = tuple(weight_matrix(module).shape) if layer_kind(module) else None
            if shape != (layer.rows, layer.cols):
                raise MpqError(
                    f"layer {name} is {type(module).__name__} {shape or ''} in the model, but {layer.kind} "
                    f"{(layer.rows, layer.cols)} in the allocation: it was made for another model"
                )
    return [(layer, schemes[layer.name]) for layer in allocation.layers]


class WeightRounding(nn.Module):
    """A parametrization: the weight on the grid of its first rounding, whose scales are fixed or learned.

    If not `active`, the weight is returned unrounded (`mpq.training.stages`).
    """

    active = True

    def __init__(self, quantized: Quantized, owner: nn.Module, learned: bool = False, method: str = "") -> None:
        super().__init__()
        self.transposed, self.method = is_transposed(layer_kind(owner)), method
        self.rounding = GridRounding(quantized, learned)
        weight: Tensor = owner.weight  # type: ignore[assignment]
        rounded = matrix_to_weight(dequantize(quantized), owner).to(weight.dtype)
        with torch.no_grad():  # if the method chose another code than the nearest, the weight starts on that code
            weight.copy_(torch.where(self(weight) == rounded, weight, rounded))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        if not self.active:
            return weight
        return shaped(self.rounding(self._matrix(weight)), weight.shape, self.transposed).to(weight.dtype)

    def quantized(self, weight: Tensor) -> Quantized:
        """The codes and tables of `forward`, for packing."""
        return self.rounding.quantized(self._matrix(weight))

    def _matrix(self, weight: Tensor) -> Tensor:
        return (weight.transpose(0, 1) if self.transposed else weight).flatten(1)


class InputRounding:
    """A hook that rounds a layer's input to its activation format, straight-through; only while `active`."""

    active = True

    def __init__(self, format: Format, scale: float | None = None) -> None:
        self.format, self.scale = format, scale

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with its input rounded."""
        if not self.active:
            return args, kwargs
        rounded = straight_through(
            call_input(args, kwargs), lambda inputs: fake_quantize_inputs(module, inputs, self.format, self.scale)
        )
        return with_call_input(args, kwargs, rounded)


def rounding_of(module: nn.Module) -> WeightRounding | None:
    """The rounding of a simulated layer's weight, None for any other module."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    last = module.parametrizations["weight"][-1]  # type: ignore[index]
    return last if isinstance(last, WeightRounding) else None
