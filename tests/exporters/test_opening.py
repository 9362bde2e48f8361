"""Folders of other targets, read by our readers, compute what was simulated."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import mpq
from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters.opening import kind_of, open_any
from mpq.exporters.targets import TARGETS
from mpq.exporting import export_to, ranges_for
from mpq.network.calibration import next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.sources import Source
from tests.sensitivity.small_models import seed_weights

SCHEMES = {
    "gptq": ("int4-g32", "int8-g32"), "compressed-tensors": ("int4-g32", "int3-g64", "nvfp4"),
    "modelopt": ("nvfp4", "fp8-e4m3+a:fp8-e4m3"), "mlx": ("uint4-g64-mfp16", "mxfp4"), "gguf": ("int4-g32", "int8-g32"),
}  # fmt: skip
TOKENS = torch.randint(0, 512, (2, 24), generator=seeded(5))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1).eval()
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return Source(str(folder), model, (TOKENS,), (TOKENS,), next_token_loss, "perplexity")


def written(source, name, folder):
    target, layers = TARGETS[name], find_layers(source.model)
    schemes: dict[str, str] = {}
    for index, layer in enumerate(layers):
        held = [one for one in SCHEMES[name] if not target.refusal(layer, mpq.parse_scheme(one))] or ["fp32"]
        schemes.setdefault(layer.tie or layer.name, held[index % len(held)])
    chosen = tuple(schemes[layer.tie or layer.name] for layer in layers)
    allocation = Allocation(layers, chosen, provenance={"model": source.name})
    return export_to(name, source, allocation, folder, "nearest"), allocation


@pytest.mark.parametrize("name", SCHEMES)
def test_a_targets_folder_computes_what_was_simulated(name, source, tmp_path):
    if any(pytest.importorskip(package) is None for package in TARGETS[name].packages):
        return
    folder, allocation = written(source, name, tmp_path / "out")
    opened = open_any(folder)
    assert opened.kind == name
    assert opened.allocation.schemes == allocation.schemes
    expected = mpq.simulate(
        source.model, allocation, method="nearest", trainable=False, ranges=ranges_for(source, allocation)
    )
    with torch.no_grad():
        logits, wanted = (model(TOKENS).logits.float() for model in (opened.model, expected))
        plain = source.model(TOKENS).logits
    assert (logits - wanted).norm() < 1e-4 * wanted.norm() < 1e-2 * (plain - wanted).norm()
    assert torch.equal(mpq.load(folder)(TOKENS).logits, opened.model(TOKENS).logits)


@pytest.mark.parametrize("name", ["gptq", "mlx", "gguf"])
def test_folders_of_other_tools_are_read_by_their_config(name, source, tmp_path):
    if name == "gguf":
        pytest.importorskip("gguf")
    folder, allocation = written(source, name, tmp_path / "out")
    expected = open_any(folder).model(TOKENS).logits
    for file in ("allocation.json", "checksums.json"):
        (folder / file).unlink()
    opened = open_any(folder)
    assert torch.equal(opened.model(TOKENS).logits, expected)
    found, known = opened.allocation.scheme_of, allocation.scheme_of
    same = [
        found[name].weight.effective_bits(64, 128) == one.weight.effective_bits(64, 128) for name, one in known.items()
    ]
    assert np.mean([ok or known[name].weight.is_float_copy for ok, name in zip(same, known, strict=True)]) == 1


@pytest.mark.parametrize(("name", "file"), [("compressed-tensors", "config"), ("gptq", "scales"), ("gguf", "tensor")])
def test_files_altered_after_the_export_are_refused(name, file, source, tmp_path):
    if file == "tensor":
        pytest.importorskip("gguf")
    folder, _ = written(source, name, tmp_path / "out")
    if file == "config":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    elif file == "scales":  # the same bytes in another shape
        path = folder / "model.safetensors"
        tensors = load_file(path)
        scales = next(key for key in tensors if key.endswith(".scales"))
        tensors[scales] = tensors[scales].reshape(-1, 1)
        save_file(tensors, path)
    else:
        path = folder / "model.gguf"
        content = bytearray(path.read_bytes())
        content[-40] ^= 4
        path.write_bytes(content)
    with pytest.raises(MpqError, match=r"is not (as it was exported|what was exported|stored as int)"):
        mpq.load(folder)


def test_the_command_line_evaluates_and_generates_from_them(source, tmp_path, capsys):
    np.savez(tmp_path / "tokens.npz", input_ids=np.random.default_rng(0).integers(0, 512, (10, 32)))
    folder, _ = written(source, "gptq", tmp_path / "out")
    data = ["--dataset", str(tmp_path / "tokens.npz"), "--nsamples", "4"]
    assert main(["eval", str(folder), *data]) == 0
    assert "KL from the original" in capsys.readouterr().out
    assert main(["eval", source.name, *data]) == 0
    assert "32.000 bits per weight" in capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_unreadable_folders_are_reported_in_one_sentence(source, tmp_path):
    folder, _ = written(source, "gptq", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    expected = ("awq", "weights of 'awq', which mpq does not read"), ("gptq", "second layout"), ([1], "weights of")
    for method, message in expected:
        other = tmp_path / str(method)
        shutil.copytree(folder, other)
        changed = {**config["quantization_config"], "quant_method": method, "checkpoint_format": "gptq_v2"}
        (other / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        (other / "checksums.json").unlink()  # other tools' folders have no checksums
        with pytest.raises(MpqError, match=message):
            open_any(other)
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    with pytest.raises(MpqError, match="ONNX Runtime runs and mpq does not"):
        kind_of(tmp_path / "graph")
    with pytest.raises(MpqError, match="not a folder"):
        mpq.load(tmp_path / "nothing")
