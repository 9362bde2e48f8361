"""A common tensor scale, the largest, for layers that servers fuse (q/k/v, gate/up)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.network.layers import weight_matrix
from mpq.quantized import checked_layers
from mpq.rounding.codes import round_scales
from mpq.rounding.reference import Quantized, tensor_scale_of

NEGLIGIBLE = 2.0**-12  # share of a layer's largest scale: smaller group scales may be rounded under the tensor scale


def shared_scales(model: nn.Module, allocation: Allocation) -> dict[str, Tensor]:
    """The largest tensor scale of each layer's ties, () float32, by layer name; of formats that have one."""
    own: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for layer, scheme in checked_layers(model, allocation):
        if scheme.weight.tensor_scale and layer.tie:
            scale = tensor_scale_of(weight_matrix(model.get_submodule(layer.name)).detach().float(), scheme.weight)
            assert scale is not None
            own[layer.name] = scale
            largest[layer.tie] = torch.maximum(largest.get(layer.tie, scale), scale)
    ties = {layer.name: layer.tie for layer in allocation.layers}
    return {name: largest[ties[name]] for name in own}


def with_shared_scale(name: str, quantized: Quantized, shared: Mapping[str, Tensor]) -> Quantized:
    """The same values under the shared tensor scale.

    Raises:
        MpqError: group scales that matter cannot be written as multiples of it.
    """
    if name not in shared or quantized.tensor_scale is None or quantized.scales is None:
        return quantized
    scale = shared[name].to(quantized.scales.device)
    wanted = quantized.scales * (quantized.tensor_scale / scale)
    scales = round_scales(wanted, quantized.format.scale)
    off = (scales != wanted) & (wanted > NEGLIGIBLE * wanted.max())
    if bool(off.any()):
        raise MpqError(f"the scales of layer {name} are no multiples of the scale that its ties share: round it anew")
    return replace(quantized, scales=scales, tensor_scale=scale.clone())
