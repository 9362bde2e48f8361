"""KV-cache formats of other targets: written settings, serving commands, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mpq
from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.table import SensitivityTable
from mpq.exporters.caches import check_cache
from mpq.exporters.holding import restrict
from mpq.exporters.targets import TARGETS
from mpq.memory import Request, Serving, splits
from mpq.network.calibration import next_token_loss
from mpq.sources import Source

ENTRIES = tuple(Layer(f"cache.{i}.{kind}", kind, 2, 32) for i in range(3) for kind in ("keys", "values"))


def allocation_of(*names: str) -> Allocation:
    return Allocation((), (), cache=CacheFormats(ENTRIES, names))


def served(target: str, *names: str) -> str:
    allocation = allocation_of(*names)
    check_cache(TARGETS.named(target), allocation)
    return TARGETS.named(target).serving("DIR", allocation.cache)


def test_serving_commands_name_the_cache_formats() -> None:
    assert served("vllm", *["fp8-e4m3"] * 6) == "vllm serve DIR --kv-cache-dtype fp8"
    mixed = ["fp8-e4m3", "fp8-e4m3", "fp16", "fp16", "fp8-e4m3", "fp8-e4m3"]
    assert served("vllm", *mixed).endswith("--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 1")
    assert served("vllm", *["fp16"] * 6) == "vllm serve DIR"
    assert served("llama.cpp", *["int8-g32", "int4-g32-asym"] * 3).endswith("-fa on -ctk q8_0 -ctv q4_1")
    assert served("mpq", "int3", "int8-token", "mxfp4", "fp16", "int4-g8", "int2-asym").startswith("mpq generate DIR")
    assert TARGETS.named("vllm").serving("DIR") == "vllm serve DIR"


@pytest.mark.parametrize(
    ("target", "names", "sentence"),
    [
        ("vllm", ["int4-asym"] * 6, "cannot serve cache.0.keys in int4-token-asym: the nearest it can serve is fp8"),
        ("vllm", ["fp8-e4m3", "fp16"] * 3, "serves keys and values of a layer in one format"),
        ("llama.cpp", ["int8-g32"] * 4 + ["fp16"] * 2, "serves the keys of all layers in one format"),
        ("onnx", ["fp16"] * 6, "cannot store cache formats"),
        ("vllm:cpu", ["fp8-e4m3"] * 6, "cannot store cache formats"),
    ],
)
def test_unsupported_caches_are_refused_by_name(target: str, names: list[str], sentence: str) -> None:
    with pytest.raises(MpqError, match=sentence):
        served(target, *names)


@pytest.mark.parametrize(("target", "alike"), [("vllm", "layers"), ("llama.cpp", "kinds")])
def test_searches_are_restricted_to_supported_cache_formats(target: str, alike: str) -> None:
    names = ("kv:fp8-e4m3", "kv:fp16") if target == "vllm" else ("kv:int4-g32", "kv:int8-g32", "kv:fp16")
    scores = np.random.default_rng(0).random((6, 1)) * np.linspace(2, 0, len(names))
    weights = Layer("a", "linear", 64, 64)
    table = SensitivityTable((weights,), ("int8-channel",), [[1.0]], [[0.0]], "x")
    table = table.with_entries(ENTRIES, names, scores, np.zeros_like(scores))
    model = torch.nn.Sequential()
    model.a = torch.nn.Linear(64, 64, bias=False)
    holder = TARGETS.named(target)
    bits = 12.0
    (cache,) = splits(restrict(table, holder), Request(model, Serving(100, 1, None, bits), holder))
    assert cache.bits <= bits
    assert len(set(cache.names)) == 2
    check_cache(holder, Allocation((), (), cache=cache))
    assert cache.entries == ENTRIES
    chosen = sum(scores[i, names.index(f"kv:{name}")] for i, name in enumerate(cache.names))
    by_hand = [
        sum(scores[i, names.index(f"kv:{name}")] for i, name in enumerate(other))
        for other in _possible(alike, [name.removeprefix("kv:") for name in names])
        if CacheFormats(ENTRIES, tuple(other)).bits <= bits
    ]
    assert chosen == pytest.approx(min(by_hand))


def _possible(alike: str, names: list[str]) -> list[list[str]]:
    if alike == "kinds":
        return [[k, v] * 3 for k in names for v in names]
    return [[a, a, b, b, c, c] for a in names for b in names for c in names]


def test_a_folder_for_vllm_holds_the_scheme_and_its_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape)).eval()
    batches = (torch.randint(0, 64, (4, 16)),)
    source = Source("mine", model, batches, batches, next_token_loss, kind="perplexity")
    settings = {"formats": ["int8-channel"], "metric": "fisher", "progress": False, "effort": "fast", "bits": 9}
    mpq.quantize(source, tmp_path / "out", target="vllm", kv_bits=8, **settings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert config["kv_cache_scheme"]["type"] == "float"
    assert "vllm serve . --kv-cache-dtype fp8\n" in (tmp_path / "out" / "README.md").read_text()
