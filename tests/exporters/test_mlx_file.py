import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.configurations import read_configuration
from mpq.exporters.holding import check
from mpq.exporters.mlx import mlx_tensors, read
from mpq.exporters.targets import TARGETS
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.rounding.reference import dequantize, quantize
from tests.exporters.architectures import model_of

SCHEMES = [name for name in TARGETS["mlx"].schemes if not parse_format(name).is_float_copy]


def unpacked(words, bits):
    """Unpack MLX's layout one value at a time: a row is one big integer, whose lowest bits are its first code."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(row))
        rows.append([stream >> (bits * i) & (2**bits - 1) for i in range(32 * len(row) // bits)])
    return torch.tensor(rows)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.sampled_from(["fp16", "bf16", "fp32"]))
def test_the_documented_formula_matches_our_dequantization(bits, size, kind):
    format = parse_format(f"uint{bits}-g{size}-s{kind}-m{kind}".replace("-sfp16", ""))
    quantized = quantize(torch.randn(3, 256, generator=seeded(0, bits, size)), format)
    tensors = mlx_tensors(pack(quantized))
    codes = unpacked(tensors["weight"].view(torch.int32), bits)
    scales, biases = (tensors[name].float().repeat_interleave(size, 1) for name in ("scales", "biases"))
    assert torch.equal(codes * scales + biases, dequantize(quantized))
    assert tensors["scales"].dtype == tensors["biases"].dtype
    assert torch.equal(read(parse_scheme(format.name), tensors)[0], dequantize(quantized))


def test_the_config_lists_each_layers_mode(tmp_path):
    model = model_of("llama")
    layers = find_layers(model, exclude="*.1.self_attn.*")
    schemes = tuple("bf16" if layer.name == "lm_head" else SCHEMES[i % 5] for i, layer in enumerate(layers))
    folder = export(model, Allocation(layers, schemes), tmp_path / "out", to="mlx")
    text = (folder / "config.json").read_text()
    config, tensors = json.loads(text), load_file(folder / "model.safetensors")
    assert read_configuration("mlx", text, layers).schemes == schemes
    assert config["rope_theta"] == 500.0
    assert "quantization_config" not in config
    for layer, scheme in zip(layers, schemes, strict=True):
        names = {name.removeprefix(f"{layer.name}.") for name in tensors if name.startswith(f"{layer.name}.")}
        assert names == ({"weight"} if scheme == "bf16" else {"weight", "scales", "biases"})
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float32
    assert tensors["model.embed_tokens.weight"].dtype == torch.uint32


def test_rope_settings_are_written_under_the_older_keys_too(tmp_path):
    model = model_of("gemma3_text")
    layers = find_layers(model)
    folder = export(model, Allocation(layers, ("uint4-g64-mfp16",) * len(layers)), tmp_path / "out", to="mlx")
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (5000.0, 500.0)
    assert (config["rope_scaling"]["type"], config["rope_scaling"]["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (Layer("a", "linear", 64, 64), "int4-g64", r"a scale and a minimum each.* is uint4-g64-mfp16"),
        (Layer("a", "linear", 64, 256), "int8-channel", r" is uint8-g128-mfp16"),
        (Layer("a", "linear", 64, 64), "uint7-g64-mfp16", r"scale and a minimum"),
        (Layer("a", "linear", 64, 64), "uint4-g64-mbf16", r"of one type.* is uint4-g64-mfp16"),
        (Layer("a", "linear", 64, 64), "nvfp4", r"nearest it supports is mxfp4"),
        (Layer("a", "linear", 64, 96), "uint4-g64-mfp16", r"96 weights do not divide into groups of 64.* is q4_1"),
        (Layer("a", "conv2d", 64, 96), "uint4-g32-mfp16", r"not conv2d"),
        (Layer("a", "linear", 64, 64), "mxfp8-e4m3+a:int8-token", r"stay in floating point"),
    ],
)
def test_formats_that_mlx_lacks_are_refused(layer, scheme, message):
    with pytest.raises(MpqError, match=message):
        check(TARGETS["mlx"], Allocation((layer,), (scheme,)))


def test_unsupported_models_are_refused(tmp_path):
    model = model_of("llama")
    model.config.model_type = "llama7"
    layers = find_layers(model)
    with pytest.raises(MpqError, match="mlx supports transformers' llama, mistral"):
        export(model, Allocation(layers, ("mxfp4",) * len(layers)), tmp_path / "out", to="mlx")


def test_differing_weights_are_detected(tmp_path, monkeypatch):
    from mpq.exporters import transformers_folder

    written = transformers_folder.write_tensors

    def damage(draft, specs, tensors, shard):
        digests = written(draft, specs, tensors, shard)
        stored = load_file(draft / "model.safetensors")
        stored["lm_head.weight"][0, 0] = 0
        save_file(stored, draft / "model.safetensors", metadata={"format": "pt"})
        from mpq.exporters.shards import tensor_digest

        return {file: {name: tensor_digest(stored[name]) for name in names} for file, names in digests.items()}

    monkeypatch.setattr(transformers_folder, "write_tensors", damage)
    model = model_of("llama")
    layers = find_layers(model)
    with pytest.raises(MpqError, match="layer lm_head reads back other numbers"):
        export(model, Allocation(layers, ("uint4-g64-mfp16",) * len(layers)), tmp_path / "out", to="mlx")
