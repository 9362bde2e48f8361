"""ModelOpt's checkpoints of several precisions, which vLLM (0.32) and TensorRT-LLM read.

config.json and hf_quant_config.json name an algorithm for each layer. A layer has `weight` (fp8, or two 4-bit floats a
byte), `weight_scale` (of the tensor, the rows or groups), `weight_scale_2` (NVFP4's tensor scale) and `input_scale`
where activations have a static one. NVFP4's activations have 1: our scheme finds their group scales without it.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.scheme import Scheme
from mpq.exporters.request import ExportRequest
from mpq.exporters.rules import MODELOPT_ALGORITHMS
from mpq.exporters.transformers_folder import export_transformers, sizer_of
from mpq.kernels.layout import Packed, unpack_bits
from mpq.network.layers import layer_kind, matrix_to_weight
from mpq.network.ranges import Ranges, static_scale
from mpq.rounding.codes import decode, decode_scales

FILE = "hf_quant_config.json"


def export(request: ExportRequest) -> Path:
    """Write a transformers model as ModelOpt does; the folder. FP8 with one activation scale needs `ranges`.

    Raises:
        MpqError: no transformers model, a scheme without an algorithm, fused layers in two, foreign files.
    """
    model, allocation, ranges = request.model, request.allocation, request.ranges or {}
    for layer in allocation.layers:
        if _algorithm(allocation.scheme_of[layer.name]) == "FP8" and layer.name not in ranges:
            raise MpqError(f"modelopt needs the range of layer {layer.name}'s inputs: export with ranges")
    coded = any(_algorithm(scheme) for scheme in allocation.scheme_of.values())

    def config() -> dict[str, Any]:
        described = {"quant_method": "modelopt", **_layers(model, allocation, "ignore")}
        return {"quantization_config": described} if coded else {}

    def texts() -> dict[str, str]:
        return {FILE: _legacy(model, allocation)} if coded else {}

    return export_transformers("modelopt", request, partial(_named, model, ranges), config, read, texts=texts)


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """Bytes of the file of an allocation, whatever the ranges."""
    return sizer_of(model, partial(_named, model, defaultdict(lambda: (0.0, 1.0))))


def _algorithm(scheme: Scheme) -> str | None:
    return MODELOPT_ALGORITHMS.get(scheme.name)


def _layers(model: nn.Module, allocation: Allocation, ignored: str) -> dict[str, Any]:
    """The algorithm of every layer; `ignored` is the key of the linear layers that have none."""
    described: dict[str, dict[str, Any]] = {}
    for layer in allocation.layers:
        scheme = allocation.scheme_of[layer.name]
        if (algorithm := _algorithm(scheme)) is not None:
            size = {"group_size": scheme.weight.group_size} if scheme.weight.group_size else {}
            described[layer.name] = {"quant_algo": algorithm, **size}
    others = [name for name, part in model.named_modules() if layer_kind(part) == "linear" and name not in described]
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": described, ignored: others}


def _legacy(model: nn.Module, allocation: Allocation) -> str:
    quantization = {"kv_cache_quant_algo": None, **_layers(model, allocation, "exclude_modules")}
    return (
        json.dumps({"producer": {"name": "mpq"}, "quant_method": "modelopt", "quantization": quantization}, indent=1)
        + "\n"
    )


def _named(model: nn.Module, ranges: Ranges, layer: str, packed: Packed, scheme: Scheme) -> dict[str, Tensor]:
    if packed.format.is_float_copy:
        return {f"{layer}.weight": matrix_to_weight(packed.tensors["packed"], model.get_submodule(layer))}
    tensors = modelopt_tensors(packed)
    if scheme.activation is not None and scheme.activation.granularity == "tensor":
        tensors["input_scale"] = torch.tensor(static_scale(scheme.activation, ranges[layer]), dtype=torch.float32)
    elif _algorithm(scheme) == "NVFP4":
        tensors["input_scale"] = torch.ones((), dtype=torch.float32)
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


def modelopt_tensors(packed: Packed) -> dict[str, Tensor]:
    """A layer's weight and its scales by ModelOpt's names."""
    codes, scale, format = packed.tensors["packed"], packed.tensors["scale"], packed.format
    weight = codes.view(torch.float8_e4m3fn) if format.grid.bits == 8 else codes
    if format.scale == "e8m0":
        return {"weight": weight, "weight_scale": scale}
    if format.tensor_scale:
        second = packed.tensors["tensor_scale"]
        return {"weight": weight, "weight_scale": scale.view(torch.float8_e4m3fn), "weight_scale_2": second}
    return {"weight": weight, "weight_scale": scale.float().reshape(() if format.granularity == "tensor" else (-1,))}


def read(scheme: Scheme, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A layer's numbers as vLLM's kernels dequantize them, exactly."""
    format, weight, scale = scheme.weight, tensors["weight"], tensors["weight_scale"]
    if not format.group_size:
        return weight.float() * scale.reshape(-1, 1), 0.0
    codes = weight.view(torch.uint8)
    if format.grid.bits == 4:
        codes = unpack_bits(codes, 4, 2 * codes.shape[1])
    factors = scale.float() if scale.dtype == torch.float8_e4m3fn else decode_scales(scale, format.scale)
    if "weight_scale_2" in tensors:
        factors = factors * tensors["weight_scale_2"]
    return decode(codes, format.grid) * factors.repeat_interleave(format.group_size, 1), 0.0
