"""Models with KV-cache formats: exported, loaded, generating."""

from pathlib import Path

import pytest
import torch
from caching_models import CONFIGS, TOKENS, model_of
from torch import nn
from transformers import AutoModelForCausalLM

import mpq
import mpq.integrations.transformers
from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import load
from mpq.generation.generate import generate
from mpq.generation.packed_cache import PackedCache
from mpq.generation.serving import cache_formats_of, serve_cache
from mpq.kernels.kv_cache import from_bytes, quantize_heads, to_bytes
from mpq.network.cached import find_cached
from mpq.network.calibration import next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import pack_model, round_cache, simulate

NAMES = ("int4-asym", "int3-g4-asym", "fp8-e4m3", "mxfp4")  # keys and values of the two layers


def formats_of(model: nn.Module) -> CacheFormats:
    return CacheFormats(find_cached(model, TOKENS[:1], next_token_loss), NAMES)


def allocation_of(model: nn.Module) -> Allocation:
    layers = find_layers(model)
    return Allocation(layers, ("int8-channel",) * len(layers), cache=formats_of(model))


@pytest.mark.parametrize("name", ["int4-asym", "int3-g32", "nvfp4", "mxfp8-e4m3", "fp8-e4m3", "bf16", "int5-g16-asym"])
def test_bytes_include_scales_and_zeros(name: str) -> None:
    format = mpq.core.cache.parse_cache_format(name)
    heads = quantize_heads(torch.randn(2, 3, 4, 40), format)
    again = from_bytes(to_bytes(heads), format, 40)
    assert len(again.tensors) == len(heads.tensors)
    assert all(torch.equal(one, other) for one, other in zip(again.tensors, heads.tensors, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_stored_bytes_match_rounded_floats(name: str) -> None:
    model, simulated = model_of(name), model_of(name)
    formats = formats_of(model)
    serve_cache(model, formats)
    round_cache(simulated, formats)
    output = model(TOKENS)
    assert torch.equal(output.logits, simulated(TOKENS).logits)
    cache = output.cache
    assert isinstance(cache, PackedCache)
    if name in ("gpt2", "llama"):
        assert cache.nbytes == formats.nbytes(12, 2)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(TOKENS, **settings)
    assert torch.equal(greedy, simulated.generate(TOKENS, **settings))
    beams = model.generate(TOKENS, num_beams=3, **settings)
    assert torch.equal(beams, simulated.generate(TOKENS, num_beams=3, **settings))


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-lm", "llama", "gpt2"])
def test_a_checkpoint_carries_its_cache(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    allocation = allocation_of(model)
    own = model_of(name) if name == "tiny-lm" else None
    export(model, allocation, tmp_path / "out", inputs=TOKENS)
    loaded = load(tmp_path / "out", model=own)
    assert cache_formats_of(loaded) == allocation.cache
    expected = next_token_loss(simulate(model, allocation, trainable=False), TOKENS)
    without = next_token_loss(simulate(model, allocation.with_cache(None), trainable=False), TOKENS)
    assert abs(next_token_loss(loaded, TOKENS) - expected) < 0.02 * abs(without - expected)
    again = TOKENS[0]
    for _ in range(5):
        logits = loaded(again.unsqueeze(0))
        again = torch.cat([again, getattr(logits, "logits", logits)[0, -1:].argmax(-1)])
    assert generate(loaded, TOKENS[0], max_new_tokens=5).tokens == tuple(again[12:].tolist())


@torch.no_grad()
def test_from_pretrained_and_save_pretrained_carry_it(tmp_path: Path) -> None:
    model = model_of("llama")
    allocation = allocation_of(model)
    export(model, allocation, tmp_path / "out")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cache_formats_of(first) == allocation.cache
    assert isinstance(first(TOKENS).cache, PackedCache)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(second(TOKENS).logits, first(TOKENS).logits)
    assert cache_formats_of(second) == allocation.cache


@pytest.mark.parametrize("name", ["tiny-lm", "llama"])
def test_a_model_trained_with_cache_formats_is_exported(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    allocation = allocation_of(model)
    student = simulate(model, allocation)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    next_token_loss(student, TOKENS).backward()
    optimizer.step()
    trained = next_token_loss(student, TOKENS).detach()
    export(student, allocation, tmp_path / "out", inputs=TOKENS)
    loaded = load(tmp_path / "out", model=model_of(name) if name == "tiny-lm" else None)
    assert cache_formats_of(loaded) == allocation.cache
    assert float(next_token_loss(loaded, TOKENS).detach()) == pytest.approx(float(trained), rel=1e-3)
    assert float(next_token_loss(student, TOKENS).detach()) == float(trained)  # still a simulated model


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-lm", "llama"])
def test_a_loaded_model_rounds_its_keys_bit_exactly(name: str, tmp_path: Path) -> None:
    """Its loss may differ from the simulation's, whose products differ in the last bits: rounding amplifies them."""
    model = model_of(name)
    layers = find_layers(model)
    cache = CacheFormats.uniform(find_cached(model, TOKENS[:1], next_token_loss), "int2-asym")
    allocation = Allocation(layers, ("int4-g16",) * len(layers), cache=cache)
    export(model, allocation, tmp_path / "out", inputs=TOKENS)
    loaded = load(tmp_path / "out", model=model_of(name) if name == "tiny-lm" else None)
    expected = pack_model(model, allocation)
    round_cache(expected, cache)
    logits, own = (getattr(output, "logits", output) for output in (loaded(TOKENS), expected(TOKENS)))
    assert torch.equal(logits, own)


def test_reading_back_compares_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr("mpq.exporters.mpq.checkpoint.serve_cache", lambda model, formats: [])
    with pytest.raises(MpqError, match="differs"):
        export(model, allocation_of(model), tmp_path / "out", inputs=TOKENS)
    assert not (tmp_path / "out").exists()
