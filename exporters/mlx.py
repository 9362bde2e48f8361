"""MLX's folders: what mlx-lm loads (0.32), each layer quantized in its own mode, width and group size.

A group's numbers are scale times code plus bias ("affine"), or small floats times a scale ("mxfp4", "mxfp8", "nvfp4").
Codes are little-endian bit streams in 32-bit words, as ours are. Scales of 16 bits whose type is not the model's make
MLX compute in float32; the type stands in the format's name (`uint4-g64-sbf16-mbf16`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.scheme import Scheme
from mpq.exporters.configurations.mlx import quantization
from mpq.exporters.request import ExportRequest
from mpq.exporters.rules import mlx_mode
from mpq.exporters.transformers_folder import export_transformers, sizer_of
from mpq.kernels.layout import Packed, unpack_bits
from mpq.network.layers import matrix_to_weight
from mpq.rounding.codes import decode, decode_scales


def export(request: ExportRequest) -> Path:
    """Write a transformers model as mlx-lm loads it; the folder.

    Raises:
        MpqError: no transformers model that mlx-lm knows by the same names, a scheme without a mode, foreign files.
    """
    model = request.model
    config = partial(_config, model, request.allocation)
    return export_transformers("mlx", request, partial(_named, model), config, read, own_models=True)


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """Bytes of the file of an allocation."""
    return sizer_of(model, partial(_named, model))


def _config(model: nn.Module, allocation: Allocation) -> dict[str, Any]:
    schemes = {layer.name: allocation.scheme_of[layer.name] for layer in allocation.layers}
    spellings = {name: mlx_mode(scheme.weight) for name, scheme in schemes.items()}
    entries = {"quantization": quantization(spellings)} if any(spellings.values()) else {}
    return {**entries, **_rotations(model.config)}


def _rotations(config: Any) -> dict[str, Any]:
    """Rotary positions in the keys of transformers 4, which mlx-lm reads: transformers 5 nests them."""
    nested = getattr(config, "rope_parameters", None) or {}
    whole = nested.get("full_attention", nested)
    keys = {name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if "sliding_attention" in nested:
        keys["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
    kind = whole.get("rope_type", "default")
    return keys | ({} if kind == "default" else {"rope_scaling": {**whole, "type": kind}})


def _named(model: nn.Module, layer: str, packed: Packed, scheme: Scheme) -> dict[str, Tensor]:
    if packed.format.is_float_copy:
        return {f"{layer}.weight": matrix_to_weight(packed.tensors["packed"], model.get_submodule(layer))}
    return {f"{layer}.{name}": tensor for name, tensor in mlx_tensors(packed).items()}


def mlx_tensors(packed: Packed) -> dict[str, Tensor]:
    """A layer's tensors by MLX's names: weight uint32 (rows, words), scales (rows, groups), biases as scales."""
    parts = packed.tensors
    scales = parts["scale"]
    tensors = {
        "weight": parts["packed"].view(torch.uint32),
        "scales": scales if scales.is_floating_point() and scales.itemsize > 1 else scales.view(torch.uint8),
    }
    return tensors | ({"biases": parts["minimum"]} if "minimum" in parts else {})


def read(scheme: Scheme, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A layer's numbers by MLX's own formulas, exactly."""
    mode = mlx_mode(scheme.weight)
    assert mode is not None
    bits, size = mode["bits"], mode["group_size"]
    stream = tensors["weight"].view(torch.uint8)
    codes = unpack_bits(stream, bits, 8 * stream.shape[1] // bits)
    scales, biases = tensors["scales"], tensors.get("biases")
    kind = scheme.weight.scale
    factors = decode_scales(scales, kind) if kind in ("e8m0", "e4m3") else scales.float()
    numbers = decode(codes, scheme.weight.grid) * factors.repeat_interleave(size, 1)
    return numbers if biases is None else numbers + biases.float().repeat_interleave(size, 1), 0.0
