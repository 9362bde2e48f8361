"""Change along the output gradients when a layer's inputs are rounded."""

import torch
from torch import Tensor
from torch.func import functional_call

from mpq.core.formats import Format
from mpq.network.layers import output_matrix
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.derivatives import Use


@torch.no_grad()
def input_error_slopes(use: Use, format: Format) -> Tensor:
    """g_t . W (Q(x_t) - x_t) of every position t of one call of a layer, (positions of all samples,)."""
    module, place = use.module, use.gradient.device  # the weights may be elsewhere, see `mpq.network.offload`
    weights: dict[str, Tensor] = {"weight": module.weight.to(place)}  # type: ignore[dict-item]
    if getattr(module, "bias", None) is not None:
        weights["bias"] = torch.zeros_like(module.bias, device=place)  # type: ignore[arg-type]
    change = functional_call(module, weights, fake_quantize_inputs(module, use.inputs, format) - use.inputs)
    products = output_matrix(module, change * use.gradient).float().sum(-1)
    return products if products.ndim == 1 else products.sum(0)
