"""Other int4 kernels on the same weights: PyTorch's own, gemlite, MARLIN; each is used if it can be imported."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpq.kernels.clock import Contestant, copies
from mpq.kernels.gpu import marlin as marlin_layout
from mpq.rounding.reference import Quantized, dequantize

_log = logging.getLogger(__name__)
Peer = Callable[[Tensor], Contestant]  # from an input (tokens, cols) in bfloat16


@dataclass(frozen=True)
class Layer:
    """Input of every peer: int4 codes with groups and zero at code 8, on the device."""

    codes: Tensor  # uint8 (rows, cols)
    scales: Tensor  # float32 (rows, groups)
    group: int
    beyond: int  # total bytes of the copies


def peers_of(quantized: Quantized, beyond: int) -> dict[str, Peer]:
    """Peers that are installed, support the layer and agree with its dequantized product; others are logged."""
    assert quantized.scales is not None
    layer = Layer(quantized.codes, quantized.scales, quantized.format.group_size, beyond)
    x = torch.randn(4, layer.codes.shape[1], device=layer.codes.device).bfloat16()
    truth = x.float() @ dequantize(quantized).T
    found: dict[str, Peer] = {}
    for name, make in PEERS.items():
        try:
            peer = make(layer)
            output = peer(x).calls[0]()
            error = float((output.float() - truth).norm() / truth.norm())  # type: ignore[attr-defined]
        except Exception as problem:  # any exception of a foreign package excludes it
            _log.warning("%s is left out: %s", name, problem)
            continue
        if error > 0.02:  # three times the error of rounding weights and inputs to another 16-bit type
            _log.warning("%s is left out: its product differs by %.3g", name, error)
            continue
        found[name] = peer
    return found


def _torch(layer: Layer) -> Peer:
    packed = (layer.codes[:, ::2] << 4) | layer.codes[:, 1::2]
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales = torch.stack([layer.scales.T, torch.zeros_like(layer.scales.T)], -1).bfloat16().contiguous()
    weights = copies([weight, scales], layer.beyond)
    multiply = torch.ops.aten._weight_int4pack_mm
    return lambda x: Contestant([partial(multiply, x, codes, layer.group, scales) for codes, scales in weights])


def _gemlite(layer: Layer) -> Peer:
    core = importlib.import_module("gemlite.core")
    rows, cols = layer.codes.shape
    copies = max(2, layer.beyond // (rows * cols // 2))
    modules = []
    for _ in range(copies):
        module = core.GemLiteLinearTriton(
            4, group_size=layer.group, in_features=cols, out_features=rows,
            input_dtype=core.DType.BF16, output_dtype=core.DType.BF16,
        )  # fmt: skip
        scales = layer.scales.bfloat16().reshape(-1, 1)
        module.pack(layer.codes.clone(), scales, torch.full_like(scales, 8), None)
        modules.append(module)
    return lambda x: Contestant([partial(module, x) for module in modules])


def _marlin(layer: Layer) -> Peer:
    marlin = importlib.import_module("marlin")
    rows, device = layer.codes.shape[0], layer.codes.device
    weights = copies([marlin_layout.pack(layer.codes), marlin_layout.pack_scales(layer.scales.half())], layer.beyond)
    workspace = torch.zeros(rows // 128 * 16, dtype=torch.int, device=device)

    def peer(x: Tensor) -> Contestant:
        half, out = x.half(), torch.empty(x.shape[0], rows, dtype=torch.half, device=device)

        def run(weight: Tensor, scales: Tensor) -> Tensor:
            marlin.mul(half, weight, out, scales, workspace)
            return out

        return Contestant([partial(run, *tensors) for tensors in weights])

    return peer


PEERS: dict[str, Callable[[Layer], Peer]] = {"torch int4": _torch, "gemlite": _gemlite, "marlin": _marlin}
