import json
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.shards import INDEX, write_tensors
from mpq.network.layers import find_layers
from tests.sensitivity.small_models import seed_weights


def test_only_one_shard_is_in_memory(tmp_path):
    alive, peak = 0, 0

    def gone(size):
        nonlocal alive
        alive -= size

    def tensors(count, size):
        nonlocal alive, peak
        for index in range(count):
            memory = np.full(size, index, dtype=np.uint8)  # every view of the tensor keeps it alive
            alive += size
            peak = max(peak, alive)
            weakref.finalize(memory, gone, size)
            tensor = torch.from_numpy(memory)
            del memory
            yield f"t{index}", tensor
            del tensor

    specs = {f"t{index}": ((1000,), torch.uint8) for index in range(40)}
    digests = write_tensors(tmp_path, specs, tensors(40, 1000), shard=5000)
    assert len(digests) == 8
    assert 5000 <= peak <= 6000  # a shard, and the tensor that opens the next one
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 40_000
    assert {name: load_file(tmp_path / file)[name][0].item() for name, file in index["weight_map"].items()} == {
        f"t{index}": index for index in range(40)
    }


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    return seed_weights(LlamaForCausalLM(config), 0.1).eval()


@pytest.mark.parametrize("target", ["mpq", "compressed-tensors", "gptq"])
def test_every_folder_exporter_writes_the_same_tensors_in_shards(target, tmp_path):
    model = llama()
    layers = find_layers(model)
    plain = ["bf16" if layer.kind == "embedding" or layer.name == "lm_head" else "int4-g32" for layer in layers]
    allocation = Allocation(layers, tuple(plain))
    whole = load_file(export(model, allocation, tmp_path / "whole", to=target) / "model.safetensors")
    folder = export(model, allocation, tmp_path / "parts", to=target, shard=20_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert all((folder / file).stat().st_size < 20_000 + 8_000 for file in files)  # and its header
    parts = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert parts.keys() == whole.keys() == json.loads((folder / INDEX).read_text())["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("target", ["mpq", "compressed-tensors", "gptq", "onnx"])
def test_an_interrupted_export_leaves_no_files(target, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    layers = find_layers(model)
    plain = ["bf16" if layer.kind == "embedding" or layer.name == "lm_head" else "int4-g32" for layer in layers]
    extra = {"inputs": torch.zeros(1, 4, dtype=torch.long)} if target == "onnx" else {"shard": 20_000}
    if target == "onnx":
        pytest.importorskip("onnxscript")
        model, extra = (
            torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)),
            {"inputs": torch.zeros(1, 64)},
        )
        torch.nn.init.constant_(model[1].weight, torch.nan)
        layers = find_layers(model)
        plain = ["int4-g32"] * 2
    with pytest.raises(MpqError, match=r"layer (1|.*down_proj) in int4-g32: .* holds NaN"):
        export(model, Allocation(layers, tuple(plain)), tmp_path / "out", to=target, **extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_readers_refuse_a_truncated_file(target, tmp_path):
    from safetensors import SafetensorError

    model = llama()
    layers = find_layers(model)
    plain = ["bf16" if layer.kind == "embedding" or layer.name == "lm_head" else "int4-g32" for layer in layers]
    file = export(model, Allocation(layers, tuple(plain)), tmp_path / "out", to=target) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(SafetensorError):
        load_file(file)
