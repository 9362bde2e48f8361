import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import file_size, load
from mpq.exporters.mpq.state import other_state
from mpq.kernels.layout import to_layout
from mpq.kernels.weight import PackedWeight
from mpq.models import bundled_model
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model, simulate
from tests.mixes import INTEGERS, mixed_allocation
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, seed_weights

CLOSE = 1e-3  # compiled kernels give activations about 15 bits of the largest

TOKENS = torch.randint(0, 7, (3, 5), generator=seeded(3))
IMAGES = torch.randn(2, 4, 6, 6, generator=seeded(4))
FACTORY = "tests.sensitivity.small_models:"


def convolutions() -> nn.Module:
    model = seed_weights(Convolutions())
    model(IMAGES)  # batch statistics of its own
    return model.eval()


def language_model() -> nn.Module:
    return seed_weights(TiedLanguageModel()).eval()


def allocate(model, *schemes) -> Allocation:
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


def recipe(model):
    return {"kind": "factory", "path": FACTORY + type(model).__name__}


@pytest.mark.parametrize("formats", [INTEGERS, ("int3-channel", "int4-g4-asym", "bf16")])
@pytest.mark.parametrize(("build", "inputs"), [(convolutions, IMAGES), (language_model, TOKENS)])
def test_mixes_of_formats_by_rows(build, inputs, formats, tmp_path):
    model = build()
    allocation = mixed_allocation(model, formats)
    folder = export(model, allocation, tmp_path / "out", recipe=recipe(model), inputs=inputs)
    loaded = load(folder, trust=True)
    expected = simulate(model, allocation, trainable=False)(inputs)
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-5, atol=CLOSE)
    torch.testing.assert_close(simulate(model, allocation)(inputs), expected)
    assert (folder / "model.safetensors").stat().st_size == file_size(model, allocation)
    assert Allocation.load(folder / "allocation.json") == replace(allocation, provenance={"rounding": "mse"})


def test_a_mix_without_its_assignment_is_refused(tmp_path):
    model = language_model()
    mixed = mixed_allocation(model)
    with pytest.raises(MpqError, match="which row has which format"):
        export(model, Allocation(mixed.layers, mixed.schemes), tmp_path / "out", recipe=recipe(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(("build", "inputs"), [(convolutions, IMAGES), (language_model, TOKENS)])
def test_a_reloaded_model_computes_what_was_simulated(build, inputs, name, tmp_path):
    model = build()
    allocation = allocate(model, name)
    folder = export(model, allocation, tmp_path / "out", method="nearest", recipe=recipe(model))
    loaded = load(folder, trust=True)
    expected = simulate(model, allocation, "nearest", trainable=False)(inputs)
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-5, atol=CLOSE)
    assert torch.equal(loaded(inputs), pack_model(model, allocation, "nearest")(inputs))
    assert not loaded.training
    assert (folder / "model.safetensors").stat().st_size == file_size(model, allocation)


@pytest.mark.parametrize("scheme", ["int4-channel+a:int8-token", "fp8-e4m3+a:fp8-e4m3"])
def test_activation_formats_are_kept(scheme, tmp_path):
    model = convolutions()
    allocation = allocate(model, scheme)
    loaded = load(export(model, allocation, tmp_path / "out"), model=Convolutions())
    torch.testing.assert_close(loaded(IMAGES), simulate(model, allocation)(IMAGES), rtol=1e-5, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_sixteen_bits(dtype, tmp_path):
    model = language_model().to(dtype)
    allocation = allocate(model, "int4-g32", "int8-channel")
    loaded = load(export(model, allocation, tmp_path / "out", recipe=recipe(model)), trust=True)
    assert loaded(TOKENS).dtype == dtype
    assert torch.equal(loaded(TOKENS), pack_model(model, allocation)(TOKENS))


def test_layers_left_out_and_shared_tensors_are_stored_once(tmp_path):
    model = language_model()
    layers = find_layers(model, exclude="embed")
    allocation = Allocation(layers, ("int4-g32",) * len(layers))
    folder = export(model, allocation, tmp_path / "out", recipe=recipe(model))
    names = load_file(folder / "model.safetensors").keys()
    assert "embed.weight" in names
    assert "head.weight" not in names
    loaded = load(folder, trust=True)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), pack_model(model, allocation)(TOKENS))


def test_file_is_weights_and_overhead_and_header(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 10))
    layers = find_layers(model)
    overhead = 4 * (256 + 2 * 256 + 10)
    allocation = Allocation(layers, ("int3-g64-asym", "nvfp4"), overhead=overhead)
    file = export(model, allocation, tmp_path / "out") / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == allocation.size + overhead + header
    assert allocation.size == sum(
        to_layout(weight.matrix(), "rows").nbytes
        for weight in load(file.parent, model=model).modules()
        if isinstance(weight, PackedWeight)
    )


def test_shards_hold_the_same_model(tmp_path):
    model = convolutions()
    allocation = allocate(model, "int4-g32", "bf16")
    folder = export(model, allocation, tmp_path / "out", recipe=recipe(model), shard=100)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert torch.equal(load(folder, trust=True)(IMAGES), pack_model(model, allocation)(IMAGES))
    export(model, allocation, folder, recipe=recipe(model))  # a single file again: the shards are removed
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(load(folder, trust=True)(IMAGES), pack_model(model, allocation)(IMAGES))


@pytest.fixture
def exported(tmp_path):
    model = language_model()
    return export(model, allocate(model, "int4-g32"), tmp_path / "out", recipe=recipe(model))


def test_a_truncated_file_is_refused(exported):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(MpqError, match=r"model.safetensors is missing, cut or damaged"):
        load(exported, trust=True)


def test_a_tampered_tensor_is_named(exported):
    file = exported / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MpqError, match=r"model.safetensors: the tensor [\w.]+ is not what was exported"):
        load(exported, trust=True)


def test_missing_and_extra_tensors_are_named(exported):
    file = exported / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "spy": torch.zeros(1)}, file)
    with pytest.raises(MpqError, match="holds the tensor spy"):
        load(exported, trust=True)
    del tensors["twice.weight.scale"]
    save_file(tensors, file)
    with pytest.raises(MpqError, match=r"lacks the tensor twice.weight.scale"):
        load(exported, trust=True)


def test_an_edited_config_is_refused(exported):
    config = exported / "config.json"
    config.write_text(config.read_text().replace("int4-g32", "int4-g64"))
    with pytest.raises(MpqError, match=r"config.json is not as it was exported"):
        load(exported, trust=True)


def test_paths_outside_the_folder_are_refused(exported):
    checksums = json.loads((exported / "checksums.json").read_text())
    for name in ("../model.safetensors", "/etc/passwd", "a\\b", ""):
        (exported / "checksums.json").write_text(json.dumps({**checksums, name: "0"}))
        with pytest.raises(MpqError, match="not in its folder"):
            load(exported, trust=True)
        with pytest.raises(MpqError, match="not in its folder"):
            export(language_model(), allocate(language_model(), "int8"), exported)


def test_code_is_imported_only_when_trusted(exported):
    with pytest.raises(MpqError, match="trust=True"):
        load(exported)


def test_foreign_folders_are_refused(tmp_path, exported):
    with pytest.raises(MpqError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(MpqError, match=r"is .* an export of mpq"):
        load(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(MpqError, match="not a checkpoint of mpq"):
        load(tmp_path / "other")


def test_a_model_that_does_not_fit_is_refused(exported):
    with pytest.raises(MpqError, match="names a layer embed that the model lacks"):
        load(exported, model=Convolutions())


def test_foreign_files_are_never_replaced(tmp_path):
    model = language_model()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"someone's weights")
    with pytest.raises(MpqError, match=r"model.safetensors exists and was not written by an earlier export"):
        export(model, allocate(model, "int8"), folder)
    assert os.listdir(folder) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_unrelated_files_in_the_folder_are_kept(tmp_path):
    model = language_model()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "table.csv").write_text("mine")
    allocate(model, "int8").save(folder / "allocation.json")
    export(model, allocate(model, "int4-g32"), folder, recipe=recipe(model))
    assert (folder / "table.csv").read_text() == "mine"
    assert Allocation.load(folder / "allocation.json").schemes[0] == "int4-g32"
    load(folder, trust=True)


def test_a_failed_export_leaves_nothing(tmp_path):
    model = language_model()
    with torch.no_grad():
        model.twice.weight[0, 0] = torch.inf
    with pytest.raises(MpqError, match="layer twice in int8"):
        export(model, allocate(model, "int8"), tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]


@pytest.mark.parametrize("name", ["tiny-lm", "tiny-cnn"])
def test_bundled_models_load_by_name(name, tmp_path):
    model = bundled_model(name)
    allocation = allocate(model, "int4-g128", "int8-channel")
    folder = export(model, allocation, tmp_path / "out", recipe={"kind": "bundled", "name": name})
    inputs = torch.arange(40).reshape(2, 20) if name == "tiny-lm" else torch.rand(2, 1, 8, 8, generator=seeded(1))
    expected = simulate(model, allocation, trainable=False)(inputs)
    torch.testing.assert_close(load(folder)(inputs), expected, rtol=1e-4, atol=3e-3)
    content = allocation.size + sum(t.nbytes for t in other_state(model, allocation)[0].values())
    assert (folder / "model.safetensors").stat().st_size == file_size(model, allocation) >= content


def test_transformers_models_need_no_recipe(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = seed_weights(transformers.LlamaForCausalLM(config), 0.2).eval()
    allocation = allocate(model, "int4-g32", "fp8-e4m3+a:fp8-e4m3", "bf16")
    folder = export(model, allocation, tmp_path / "out")
    loaded = load(folder)
    tokens = TOKENS + 3
    expected = simulate(model, allocation)(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=CLOSE)
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False).shape == (3, 8)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert Path(folder / "generation_config.json").exists()


@pytest.mark.parametrize("fault", ["no place", "no tensor", "damaged"])
def test_a_failed_load_leaves_the_callers_model_unchanged(fault, tmp_path):
    model = convolutions()
    folder = export(model, allocate(model, "int4-g32"), tmp_path / "out", recipe=recipe(model))
    given = convolutions().train()
    if fault == "no place":
        given.head.bias = None
    elif fault == "no tensor":
        given.extra = nn.BatchNorm1d(3)
    else:
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
    modules, state = dict(given.named_modules()), {name: tensor.clone() for name, tensor in given.state_dict().items()}
    with pytest.raises(MpqError, match=r"does not have|no tensor|checksum|altered|digest"):
        load(folder, model=given)
    assert dict(given.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.state_dict().items())
    assert given.training
