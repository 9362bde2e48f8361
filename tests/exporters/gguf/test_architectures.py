"""Contents of GGUF files by architecture; `test_llama_cpp.py` runs llama.cpp on them."""

import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.gguf.architectures import ARCHITECTURES, check_config, further_tensors
from mpq.exporters.gguf.reader import read_tensors
from mpq.exporters.rules import GGUF_MODELS
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from tests.exporters.architectures import model_of

gguf = pytest.importorskip("gguf")
NORMS = {"input_layernorm": "attn_norm", "self_attn.q_norm": "attn_q_norm"}
MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def whole(model, scheme="fp32"):
    layers = find_layers(model)
    return Allocation(layers, (scheme,) * len(layers))


def test_every_supported_model_has_an_architecture():
    assert set(GGUF_MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", GGUF_MODELS)
def test_tensors_have_llama_cpps_names(kind, tmp_path):
    model = model_of(kind)
    state, found = model.state_dict(), dict(read_tensors(export(model, whole(model), tmp_path / "out", to="gguf")))
    assert torch.equal(found["token_embd.weight"], state["model.embed_tokens.weight"])
    shift = 1.0 if kind.startswith("gemma") else 0.0
    for ours, theirs in NORMS.items():
        if f"model.layers.1.{ours}.weight" in state:
            assert torch.equal(found[f"blk.1.{theirs}.weight"], state[f"model.layers.1.{ours}.weight"] + shift)
    for ours, theirs in MATRICES.items():
        weight = state.get(f"model.layers.1.{ours}.weight")
        if weight is not None and ours == "self_attn.q_proj" and ARCHITECTURES[kind].pairs_neighbours:
            weight = weight.reshape(4, 2, 32, 256).transpose(1, 2).reshape(256, 256)
        assert weight is None or torch.equal(found[f"blk.1.{theirs}.weight"], weight)
    if "model.layers.1.mlp.experts.3.up_proj.weight" in state:
        experts = [state[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] for i in range(4)]
        assert torch.equal(found["blk.1.ffn_up_exps.weight"], torch.stack(experts))
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.architecture"].contents() == ARCHITECTURES[kind].name
    assert fields[f"{ARCHITECTURES[kind].name}.rope.freq_base"].contents() == (5000 if kind == "gemma3_text" else 500)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_transformers_reader_computes_the_same(kind, tmp_path):
    model = model_of(kind)
    folder = export(model, whole(model), tmp_path / "out", to="gguf")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(3, 96, (2, 24), generator=seeded(5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_experts_of_one_stack_share_a_scheme(tmp_path):
    model = model_of("mixtral")
    layers = find_layers(model)
    mixed = tuple("q8_0" if ".experts.2.down" in layer.name else "q4_0" for layer in layers)
    with pytest.raises(MpqError, match=r"keeps the experts model\.layers\.0\.mlp\.experts\.down_proj in one tensor"):
        export(model, Allocation(layers, mixed), tmp_path / "out", to="gguf")
    tied = tuple("q8_0" if "down_proj" in layer.name else "q4_k" for layer in layers)
    folder = export(model, Allocation(layers, tied), tmp_path / "out", to="gguf")
    reader = gguf.GGUFReader(folder / "model.gguf")
    stacks = {tensor.name: (tensor.tensor_type.name, [int(size) for size in tensor.shape]) for tensor in reader.tensors}
    assert stacks["blk.0.ffn_down_exps.weight"] == ("Q8_0", [512, 256, 4])
    assert stacks["blk.1.ffn_gate_exps.weight"] == ("Q4_K", [256, 512, 4])


def test_excluded_experts_are_refused(tmp_path):
    model = model_of("mixtral")
    layers = find_layers(model, exclude="*.experts.1.*")
    with pytest.raises(MpqError, match=r"no tensor model\.layers\.0\.mlp\.experts\.1"):
        export(model, Allocation(layers, ("q8_0",) * len(layers)), tmp_path / "out", to="gguf")


def test_llama_3s_frequencies():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = model_of("llama", rope_parameters=rope).config
    factors = further_tensors(config)["rope_freqs.weight"]
    lengths = [2 * math.pi * 500000.0 ** (2 * i / 64) for i in range(32)]
    for length, factor in zip(lengths, factors.tolist(), strict=True):
        share = (8192 / length - 1) / 3
        expected = 1 if length < 2048 else 8 if length > 8192 else 1 / ((1 - share) / 8 + share)
        assert factor == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}, "'dynamic'"),
        ("gemma3_text", {"query_pre_attn_scalar": 48}, "64 features, not by 48"),
        ("qwen3_moe", {"norm_topk_prob": False}, "routing weights that sum to one"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in every layer"),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_refused(kind, changes, message, tmp_path):
    model = model_of(kind, **changes)
    with pytest.raises(MpqError, match=message):
        export(model, whole(model), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_attention_window_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        check_config(model_of("gemma3_text").config)
        check_config(model_of("qwen2").config)
        assert not caplog.records
        check_config(model_of("mistral", sliding_window=16).config)
    assert "sliding window of 16" in caplog.text
