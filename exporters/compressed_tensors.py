"""compressed-tensors checkpoints: what vLLM, SGLang and transformers load (compressed-tensors 0.20's documentation).

One `config_groups` entry per scheme with its own `format`, layers by name, everything else in `ignore`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.allocation import Allocation
from mpq.core.formats import Format
from mpq.core.scheme import Scheme
from mpq.exporters.caches import kv_cache_scheme
from mpq.exporters.request import ExportRequest
from mpq.exporters.rules import compressed_tensors_format
from mpq.exporters.transformers_folder import export_transformers, sizer_of
from mpq.kernels.layout import Packed, pack_bits, unpack, unpack_bits
from mpq.network.layers import layer_kind, matrix_to_weight
from mpq.network.ranges import Ranges, static_scale
from mpq.rounding.reference import dequantize


def export(request: ExportRequest) -> Path:
    """Write a transformers model as a compressed-tensors checkpoint; the folder.

    An fp8 activation with one scale for the tensor is static where the request has its layer's range, else dynamic.

    Raises:
        MpqError: no transformers model, a scheme that cannot be held, fused layers in several schemes, foreign files.
    """
    model, ranges = request.model, request.ranges
    named = partial(_named, model, ranges)

    def config() -> dict[str, Any]:
        return {"quantization_config": quantization_config(model, request.allocation, ranges)}

    return export_transformers("compressed-tensors", request, named, config, read)


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """Bytes of the file of an allocation."""
    return sizer_of(model, partial(_named, model, None))


def quantization_config(model: nn.Module, allocation: Allocation, ranges: Ranges | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for layer in allocation.layers:
        scheme = allocation.scheme_of[layer.name]
        if not scheme.weight.is_float_copy:
            groups.setdefault((scheme.name, _is_static(layer.name, scheme, ranges)), []).append(layer.name)
    targeted = {name for names in groups.values() for name in names}
    entries = {
        f"group_{index}": {"targets": names, **group_entry(allocation.scheme_of[names[0]], static)}
        for index, ((_, static), names) in enumerate(groups.items())
    }
    formats = {str(entry["format"]) for entry in entries.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": kv_cache_scheme(allocation.cache),
        "config_groups": entries,
        "ignore": [
            name for name, part in model.named_modules() if layer_kind(part) == "linear" and name not in targeted
        ],
    }


def group_entry(scheme: Scheme, static: bool = False) -> dict[str, Any]:
    """The `config_groups` entry of a scheme."""
    return {
        "format": compressed_tensors_format(scheme),
        "weights": _arguments(scheme.weight),
        "input_activations": None if scheme.activation is None else _arguments(scheme.activation, True, not static),
        "output_activations": None,
    }


def _arguments(format: Format, activation: bool = False, dynamic: bool = False) -> dict[str, Any]:
    strategy = "tensor_group" if format.tensor_scale else format.granularity
    arguments: dict[str, Any] = {
        "num_bits": format.grid.bits,
        "type": format.grid.family,
        "symmetric": not format.zero_point,
        "strategy": "token" if activation and strategy == "channel" else strategy,
        "group_size": format.group_size or None,
        "dynamic": dynamic,
    }
    stored = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}.get(format.scale)
    return {**arguments, **({"scale_dtype": stored, "zp_dtype": stored} if stored else {})}


def _is_static(name: str, scheme: Scheme, ranges: Ranges | None) -> bool:
    static = scheme.activation is not None and scheme.activation.name == "fp8-e4m3"
    return static and name in (ranges or {})


def _named(model: nn.Module, ranges: Ranges | None, layer: str, packed: Packed, scheme: Scheme) -> dict[str, Tensor]:
    """The layer's tensors under their names in the checkpoint."""
    if packed.format.is_float_copy:
        return {f"{layer}.weight": matrix_to_weight(packed.tensors["packed"], model.get_submodule(layer))}
    tensors = compress(packed, str(compressed_tensors_format(scheme)))
    if _is_static(layer, scheme, ranges):
        assert ranges is not None
        assert scheme.activation is not None
        device = packed.tensors["packed"].device
        tensors["input_scale"] = torch.tensor(
            [static_scale(scheme.activation, ranges[layer])], device=device, dtype=torch.float32
        )
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


def read(scheme: Scheme, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A layer's weight as compressed-tensors decompresses it, with its relative error; by our own reader if the package
    is not installed.

    Scales are taken in float32; MX and NVFP4 weights are decompressed in bfloat16, scale and product rounded once each.
    """
    storage = str(compressed_tensors_format(scheme))
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        return dequantize(unpack(uncompressed(scheme.weight, storage, tensors))), 2**-22
    theirs = QuantizationScheme(targets=["x"], **group_entry(scheme))
    state = {
        name: tensor.float() if name == "weight_scale" and tensor.dtype.itemsize > 1 else tensor
        for name, tensor in tensors.items()
        if name != "input_scale"
    }
    numbers: Tensor = BaseCompressor.get_value_from_registry(storage).decompress(state, theirs)["weight"]
    return numbers, 2**-7 if numbers.dtype == torch.bfloat16 else 2**-22


def uncompressed(format: Format, storage: str, tensors: Mapping[str, Tensor]) -> Packed:
    """The inverse of `compress`."""
    scale, bits = tensors["weight_scale"], format.grid.bits
    if format.granularity == "tensor":
        scale = scale.reshape(1, 1)
    if storage == "int-quantized":
        codes = tensors["weight"]
        return Packed(format, _shape(codes), tensors={"packed": codes.view(torch.uint8) ^ 0x80, "scale": scale})
    if storage in ("float-quantized", "mxfp8-quantized"):
        codes = tensors["weight"]
        return Packed(format, _shape(codes), tensors={"packed": codes.view(torch.uint8), "scale": scale})
    stream = tensors["weight_packed"].view(torch.uint8)
    if storage != "pack-quantized":
        parts = {"packed": stream, "scale": scale.view(torch.uint8)}
        if storage == "nvfp4-pack-quantized":
            parts["tensor_scale"] = tensors["weight_global_scale"].reciprocal()[0]
        return Packed(format, (len(stream), stream.shape[1] * 8 // bits), tensors=parts)
    rows, cols = (int(size) for size in tensors["weight_shape"])
    parts = {"packed": stream[:, : -(-cols * bits // 8)], "scale": scale}
    if "weight_zero_point" in tensors:
        words = tensors["weight_zero_point"].t().contiguous().view(torch.uint8)
        parts["zeros"] = pack_bits(unpack_bits(words, bits, rows).t().contiguous(), bits)
    return Packed(format, (rows, cols), tensors=parts)


def _shape(codes: Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


def compress(packed: Packed, storage: str) -> dict[str, Tensor]:
    """The tensors of a module, as `compressed_tensors` compressors of that name decompress them."""
    codes, scale = packed.tensors["packed"], packed.tensors["scale"]
    if packed.format.granularity == "tensor":
        scale = scale.reshape(1)
    if storage == "int-quantized":
        return {"weight": (codes ^ 0x80).view(torch.int8), "weight_scale": scale}
    if storage in ("float-quantized", "mxfp8-quantized"):
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    if storage in ("mxfp4-pack-quantized", "mxfp6-pack-quantized"):
        return {"weight_packed": codes, "weight_scale": scale}
    if storage == "nvfp4-pack-quantized":
        # Its global scale divides where ours multiplies.
        inverse = packed.tensors["tensor_scale"].reciprocal().reshape(1)
        return {
            "weight_packed": codes,
            "weight_scale": scale.view(torch.float8_e4m3fn),
            "weight_global_scale": inverse,
        }
    tensors = {"weight_packed": _words(codes), "weight_scale": scale}
    tensors["weight_shape"] = torch.tensor(packed.shape, device=codes.device)
    if "zeros" in packed.tensors:
        bits = packed.format.grid.bits
        zeros = unpack_bits(packed.tensors["zeros"], bits, scale.shape[1])
        tensors["weight_zero_point"] = _words(pack_bits(zeros.t(), bits)).t().contiguous()  # packed along the rows
    return tensors


def _words(stream: Tensor) -> Tensor:
    """Bit streams filled up to whole 32-bit words: int32."""
    padded = functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).reshape(len(stream), -1)
