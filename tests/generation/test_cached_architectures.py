"""Caches of many architectures: grouped and single heads, sinks, windows, latent vectors, layers without attention."""

from pathlib import Path

import pytest
import torch
import transformers
from caching_models import SHAPE, TOKENS
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import KEYS
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import load
from mpq.generation.generate import generate
from mpq.generation.serving import serve_cache
from mpq.network.cached import find_cached
from mpq.network.calibration import next_token_loss
from mpq.network.layers import find_layers
from mpq.network.prepare import prepared
from mpq.quantized import round_cache, simulate

GROUPED = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
LATENT = {
    **SHAPE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
HYBRID = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
ARCHITECTURES = {
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Phi3": GROUPED,
    "Cohere2": {**GROUPED, "sliding_window": 4},
    "GptOss": {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "Gemma3Text": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "Falcon": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "DeepseekV3": LATENT,
    "Bamba": {**GROUPED, **HYBRID, "mamba_n_groups": 1},
}
MADE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("keys", ["int4-g8-asym", "int4-t8-asym"])
def test_stored_caches_equal_simulated_ones(name: str, keys: str) -> None:
    model, simulated = model_of(name), model_of(name)
    entries = find_cached(model, TOKENS[:1], next_token_loss)
    names = (keys if entry.kind == KEYS and not entry.window else "int4-g8-asym" for entry in entries)
    formats = CacheFormats(entries, tuple(names))
    plain = model(TOKENS).logits
    serve_cache(model, formats)
    round_cache(simulated, formats)
    rounded = model(TOKENS).logits
    assert not torch.equal(rounded, plain)
    assert torch.equal(rounded, simulated(TOKENS).logits)
    made = model.generate(TOKENS, **MADE)
    if keys != "int4-t8-asym":  # their simulation rounds a text from its beginning
        assert torch.equal(made, simulated.generate(TOKENS, **MADE))


@torch.no_grad()
def test_latent_attention_loads_as_simulated(tmp_path: Path) -> None:
    """One latent vector and one rotary key for all heads, each in its own format."""
    model = prepared(model_of("DeepseekV3"))
    entries = find_cached(model, TOKENS[:1], next_token_loss)
    assert [(entry.kind, entry.rows, entry.cols) for entry in entries[:2]] == [("keys", 1, 16), ("values", 1, 8)]
    layers = find_layers(model)
    cache = CacheFormats(entries, ("int4-g8-asym", "int8-token") * 2)
    allocation = Allocation(layers, ("int8-channel",) * len(layers), cache=cache)
    simulated = simulate(model, allocation, trainable=False)
    export(model, allocation, tmp_path / "out")
    loaded = load(tmp_path / "out")
    expected = simulated(TOKENS).logits
    assert (loaded(TOKENS).logits - expected).abs().max() < 1e-3 < (model(TOKENS).logits - expected).abs().max()
    made = loaded.generate(TOKENS[:1], **MADE)
    assert torch.equal(made, simulated.generate(TOKENS[:1], **MADE))
    assert generate(loaded, TOKENS[0], max_new_tokens=5).tokens == tuple(made[0, TOKENS.shape[1] :].tolist())


def test_models_without_a_cache_of_keys_and_values_are_refused() -> None:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(MpqError, match="MambaForCausalLM has no cache"):
        find_cached(transformers.AutoModelForCausalLM.from_config(config), TOKENS[:1], next_token_loss)
