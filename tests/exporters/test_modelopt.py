"""ModelOpt's layout by its documented formulas, and by vLLM's reader if MPQ_VLLM_PYTHON names a Python with vLLM."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.fused import shared_scales, with_shared_scale
from mpq.exporters.holding import check
from mpq.exporters.modelopt import modelopt_tensors, read
from mpq.exporters.rules import MODELOPT_ALGORITHMS
from mpq.exporters.targets import TARGETS
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.rounding.reference import dequantize, quantize
from tests.exporters.architectures import model_of

VLLM = os.environ.get("MPQ_VLLM_PYTHON")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("name", MODELOPT_ALGORITHMS)
def test_the_documented_formulas_match_our_dequantization(name):
    scheme = parse_scheme(name)
    quantized = quantize(torch.randn(6, 64, generator=seeded(0, name)), scheme.weight)
    tensors = modelopt_tensors(pack(quantized))
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if scheme.weight.grid.bits == 4:
        nibbles = torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()
        numbers = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1, 1)
        factors = (scale.float() * tensors["weight_scale_2"]).repeat_interleave(16, 1)
    else:
        numbers = weight.float()
        blocks = scale.dtype == torch.uint8
        factors = (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1) if blocks else scale.reshape(-1, 1)
    assert torch.equal(numbers * factors, dequantize(quantized))
    assert torch.equal(read(scheme, tensors)[0], dequantize(quantized))


def allocate(model):
    layers = find_layers(model, exclude="*.1.mlp.down_proj")
    names = list(MODELOPT_ALGORITHMS)
    keys = [key for key in dict.fromkeys(layer.tie or layer.name for layer in layers) if key != "model.embed_tokens"]
    turn = {key: "bf16" if key == "lm_head" else names[i % len(names)] for i, key in enumerate(keys)}
    return Allocation(layers, tuple(turn.get(layer.tie or layer.name, "bf16") for layer in layers))


@pytest.fixture
def folder(tmp_path):
    model = model_of("llama")
    allocation = allocate(model)
    ranges = {layer.name: (-3.0, 4.48) for layer in allocation.layers}
    return export(model, allocation, tmp_path / "out", to="modelopt", ranges=ranges)


def test_the_folder_names_every_layers_algorithm(folder):
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    legacy = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    tensors = load_file(folder / "model.safetensors")
    assert said["quantized_layers"] == legacy["quantized_layers"]
    assert said["ignore"] == legacy["exclude_modules"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert {entry["quant_algo"] for entry in said["quantized_layers"].values()} == set(MODELOPT_ALGORITHMS.values())
    for name, entry in said["quantized_layers"].items():
        static = {"FP8": 4.48 / 448, "NVFP4": 1.0}.get(entry["quant_algo"])
        assert (f"{name}.input_scale" in tensors) == (static is not None)
        if static is not None:
            assert tensors[f"{name}.input_scale"].item() == pytest.approx(static)


@pytest.mark.parametrize("target", ["modelopt", "compressed-tensors"])
def test_fused_layers_share_a_tensor_scale(target, tmp_path):
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(5)
    layers = find_layers(model)
    schemes = tuple("nvfp4" if "self_attn" in layer.name else "bf16" for layer in layers)
    allocation = Allocation(layers, schemes)
    tensors = load_file(export(model, allocation, tmp_path / "out", to=target) / "model.safetensors")
    ending = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}[target]
    found = {part: tensors[f"model.layers.0.self_attn.{part}_proj.{ending}"].item() for part in "qkvo"}
    assert found["q"] == found["k"] == found["v"] != found["o"]


def test_scales_that_cannot_be_shared_are_refused():
    quantized = quantize(torch.randn(4, 64, generator=seeded(1)), parse_scheme("nvfp4").weight)
    doubled = with_shared_scale("q", quantized, {"q": quantized.tensor_scale * 2})
    assert torch.equal(dequantize(doubled), dequantize(quantized))
    with pytest.raises(MpqError, match="no multiples of the scale"):
        with_shared_scale("q", quantized, {"q": quantized.tensor_scale * 1.1})
    assert shared_scales(model_of("llama"), Allocation((), ())) == {}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("int4-g64", "no such algorithm.* is nvfp4"), ("fp8-e4m3", "no such algorithm.* is fp8-e4m3")],
)
def test_unsupported_schemes_are_refused(scheme, message):
    with pytest.raises(MpqError, match=message):
        check(TARGETS["modelopt"], Allocation((Layer("a", "linear", 64, 64),), (scheme,)))


def test_static_activations_need_ranges(tmp_path):
    model = model_of("llama")
    layers = find_layers(model)
    schemes = tuple("fp8-e4m3+a:fp8-e4m3" if "mlp" in layer.name else "bf16" for layer in layers)
    with pytest.raises(MpqError, match="needs the range of layer model"):
        export(model, Allocation(layers, schemes), tmp_path / "out", to="modelopt")
    floats = export(model, Allocation(layers, ("bf16",) * len(layers)), tmp_path / "out", to="modelopt")
    assert "quantization_config" not in json.loads((floats / "config.json").read_text())
    assert not (floats / "hf_quant_config.json").exists()


@pytest.mark.skipif(not VLLM, reason="MPQ_VLLM_PYTHON names no Python with vLLM")
def test_vllms_reader_has_a_parameter_for_every_tensor(folder):
    script = Path(__file__).parents[2] / "experiments" / "peers" / "vllm_modelopt.py"
    command = [str(VLLM), str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["wrong"] == []
    assert set(answer["algorithms"].values()) == set(MODELOPT_ALGORITHMS.values())
