"""The GPTQ checkpoint layout (AutoGPTQ, gptqmodel, vLLM's marlin kernels), bits and groups per layer in `dynamic`.

qweight int32 (in * bits / 32, out): each column the bit stream of an output's codes; scales float16 (groups, out);
qzeros int32 (groups, out * bits / 32): each group's zero points less one, 2**(bits - 1) - 1 as the grids are symmetric;
g_idx int32 (in,): the group of each input.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.formats import Format
from mpq.core.scheme import Scheme
from mpq.exporters.request import ExportRequest
from mpq.exporters.rules import served_names
from mpq.exporters.transformers_folder import export_transformers, sizer_of
from mpq.kernels.layout import Packed, pack_bits, unpack_bits
from mpq.network.layers import layer_kind, matrix_to_weight


def export(request: ExportRequest) -> Path:
    """Write a transformers model in the GPTQ layout, rounded by any method; returns the folder.

    Raises:
        MpqError: no transformers model, a scheme that the layout cannot hold, fused layers in two, foreign files.
    """
    config = partial(_config, request.model, request.allocation)
    return export_transformers("gptq", request, partial(_named, request.model), config, read)


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """Bytes of the file of an allocation."""
    return sizer_of(model, partial(_named, model))


def _named(model: nn.Module, layer: str, packed: Packed, scheme: Scheme) -> dict[str, Tensor]:
    if packed.format.is_float_copy:
        return {f"{layer}.weight": matrix_to_weight(packed.tensors["packed"], model.get_submodule(layer))}
    return {f"{layer}.{name}": tensor for name, tensor in gptq_tensors(packed).items()}


def gptq_tensors(packed: Packed) -> dict[str, Tensor]:
    """The layer's tensors in the GPTQ layout."""
    format, (rows, cols) = packed.format, packed.shape
    bits, groups = format.grid.bits, format.groups(cols)
    zeros = torch.full((groups, rows), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    return {
        "qweight": _words(packed.tensors["packed"]).t().contiguous(),
        "qzeros": _words(pack_bits(zeros, bits)),
        "scales": packed.tensors["scale"].t().contiguous(),
        "g_idx": torch.arange(cols, dtype=torch.int32) // (format.group_size or cols),
    }


def read(scheme: Scheme, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A layer's numbers by the layout's own formula, scale times (code - zero point), exactly."""
    bits = scheme.weight.grid.bits
    cols, rows = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    if tensors["scales"].shape[1] != rows:
        raise ValueError(f"scales of {tuple(tensors['scales'].shape)} for {rows} rows")
    codes = unpack_bits(tensors["qweight"].t().contiguous().view(torch.uint8), bits, cols)
    zeros = unpack_bits(tensors["qzeros"].view(torch.uint8), bits, rows).int() + 1
    group = tensors["g_idx"].long()
    return (tensors["scales"].float()[group] * (codes.t().int() - zeros[group])).t(), 0.0


def _words(stream: Tensor) -> Tensor:
    return stream.reshape(-1).view(torch.int32).reshape(len(stream), -1)


def _config(model: nn.Module, allocation: Allocation) -> dict[str, Any]:
    formats = {layer.name: allocation.scheme_of[layer.name].weight for layer in allocation.layers}
    coded = {name: _numbers(format) for name, format in formats.items() if not format.is_float_copy}
    usual = Counter(coded.values()).most_common(1)[0][0] if coded else (4, 128)
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(served)}$": {"bits": bits, "group_size": size}
        for name, (bits, size) in coded.items()
        if (bits, size) != usual
        for served in served_names(name)
    }
    for name, module in model.named_modules():
        if layer_kind(module) == "linear" and name not in coded:
            dynamic.update({f"-:^{re.escape(served)}$": {} for served in served_names(name)})
    described = {
        "quant_method": "gptq",
        "bits": usual[0],
        "group_size": usual[1],
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" in coded,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }
    return {"quantization_config": described}


def _numbers(format: Format) -> tuple[int, int]:
    return format.grid.bits, format.group_size or -1
