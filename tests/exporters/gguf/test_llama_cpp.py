"""llama.cpp reads our files and gives our perplexity. Needs MPQ_LLAMA_PYTHON, a Python with llama-cpp-python."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpq.card import write_card
from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.layer import KEYS
from mpq.exporters import export
from mpq.exporters.rules import GGUF_MODELS, GGUF_TYPES
from mpq.exporters.targets import TARGETS
from mpq.network.cached import find_cached
from mpq.network.calibration import mean_loss, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from tests.exporters.architectures import model_of
from tests.sensitivity.small_models import seed_weights

pytest.importorskip("gguf")
PYTHON = os.environ.get("MPQ_LLAMA_PYTHON")
ROOT = Path(__file__).parents[3]
DATA = ROOT / ".." / "shared" / "data"
pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not PYTHON, reason="MPQ_LLAMA_PYTHON names no Python with llama-cpp-python"),
]
TOKENS = torch.randint(0, 64, (4, 48), generator=seeded(5))


def ask(folder, windows, texts=()):
    for name, content in (("windows", windows.tolist()), ("texts", list(texts))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    script = ROOT / "experiments" / "peers" / "consumer.py"
    files = [str(folder / "windows.json"), "--texts", str(folder / "texts.json")]
    command = [PYTHON, str(script), "llama.cpp", str(folder), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)


def llama(tied=False, **changes):
    """A Llama with a head so large that each type's rounding moves the perplexity, by 1 to 5 % below 6 bits."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, max_position_embeddings=64, **changes,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def compare(model, allocation, folder, **options):
    """Within 0.5 %: llama.cpp rounds a layer's inputs to 8 bits, which changes the perplexity by 0.2 %."""
    export(model, allocation, folder, to="gguf", **options)
    ours = math.exp(mean_loss(simulate(model, allocation, trainable=False), [TOKENS], next_token_loss))
    assert ask(folder, TOKENS)["perplexity"] == pytest.approx(ours, rel=0.005)


@pytest.mark.parametrize("scheme", sorted(GGUF_TYPES))
def test_every_tensor_type_has_the_simulated_perplexity(scheme, tmp_path):
    model = llama()
    layers = find_layers(model)
    compare(model, Allocation(layers, (scheme,) * len(layers)), tmp_path / "out")


@pytest.mark.parametrize("kind", GGUF_MODELS)
def test_every_architecture_has_the_simulated_perplexity(kind, tmp_path):
    """Within 0.1 %, as llama.cpp's cache has 16 bits; of experts 0.5 %, since a token may be routed to another one."""
    model = model_of(kind)
    layers = find_layers(model)
    export(model, Allocation(layers, ("fp32",) * len(layers)), tmp_path / "out", to="gguf")
    ours = math.exp(mean_loss(model, [TOKENS], next_token_loss))
    assert ask(tmp_path / "out", TOKENS)["perplexity"] == pytest.approx(ours, rel=5e-3 if "moe" in kind else 1e-3)


@pytest.mark.parametrize("kind", ["mixtral", "gemma3_text", "phi3"])
def test_mixes_in_every_architecture_have_the_simulated_perplexity(kind, tmp_path):
    """Within 1 % for 8-bit activations; of experts 4 %."""
    model = model_of(kind)
    layers = find_layers(model)
    ties = list(dict.fromkeys(layer.tie or layer.name for layer in layers))
    turn = {tie: ("q6_k", "q8_0", "q5_k")[index % 3] for index, tie in enumerate(ties)}
    allocation = Allocation(layers, tuple(turn[layer.tie or layer.name] for layer in layers))
    export(model, allocation, tmp_path / "out", to="gguf")
    ours = math.exp(mean_loss(simulate(model, allocation, trainable=False), [TOKENS], next_token_loss))
    assert ask(tmp_path / "out", TOKENS)["perplexity"] == pytest.approx(ours, rel=0.04 if kind == "mixtral" else 0.01)


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0] * 32, "long_factor": [1.5 + i / 5 for i in range(32)],
        "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "llama3", **LLAMA_3}),
        ("qwen2", {"rope_type": "linear", "factor": 4.0}),
        ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("phi3", {"rope_type": "longrope", **LONG}),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_every_kind_of_rotary_position_has_the_simulated_perplexity(kind, rope, tmp_path):
    original = {"original_max_position_embeddings": 32} if "long_factor" in rope else {}
    model = model_of(kind, rope_parameters={"rope_theta": 500.0, **rope}, **original)
    layers = find_layers(model)
    export(model, Allocation(layers, ("fp32",) * len(layers)), tmp_path / "out", to="gguf")
    ours = math.exp(mean_loss(model, [TOKENS], next_token_loss))
    assert ask(tmp_path / "out", TOKENS)["perplexity"] == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_split_mix_with_biases_has_the_simulated_perplexity(tied, tmp_path):
    model = llama(tied, attention_bias=True)
    layers = find_layers(model, exclude="*.1.self_attn.*")
    kinds = [name for name in GGUF_TYPES if name != "fp32"]
    mix = Allocation(layers, tuple(kinds[i % len(kinds)] for i in range(len(layers))))
    compare(model, mix, tmp_path / "out", shard=200_000)
    assert len(list((tmp_path / "out").glob("model-*.gguf"))) > 2


@pytest.mark.parametrize("name", ["wikitext2_llama_5m", "stories260K"])
def test_tokenizers_agree(name, tmp_path):
    source = DATA / name
    if not source.is_dir():
        pytest.skip(f"the data folder has no {name}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    layers = find_layers(model)
    folder = export(
        model, Allocation(layers, ("fp16",) * len(layers)), tmp_path / "out", to="gguf", tokenizer=tokenizer
    )
    texts = [
        "Once upon a time, there was a little girl named Lily.",
        "In 1998 it's  a test: 12345!\n\nÉté",
        "café ☕ x",
    ]
    answer = ask(folder, TOKENS, texts)
    assert answer["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_cut_file_is_refused_by_llama_cpp(tmp_path):
    model = llama()
    layers = find_layers(model)
    folder = export(model, Allocation(layers, ("q4_k",) * len(layers)), tmp_path / "out", to="gguf")
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(AssertionError, match="Failed to load model"):
        ask(folder, TOKENS)


@pytest.mark.parametrize(
    ("keys", "values"),
    [("fp16", "int4-g32"), ("int4-g32", "fp16"), ("int5-g32", "int8-g32"), ("iq4_nl", "int4-g32-asym"),
     ("int8-g32", "int5-g32-asym"), ("int4-g32-asym", "iq4_nl"), ("int5-g32-asym", "int5-g32")],
)  # fmt: skip
def test_served_caches_lose_as_much_as_simulated(keys, values, tmp_path):
    """Equal mean error, not equal tokens: llama.cpp rotates heads before rounding and chooses scales differently."""
    model = llama()
    layers, entries = find_layers(model), find_cached(model, TOKENS[:1], next_token_loss)
    cache = CacheFormats(entries, tuple(keys if entry.kind == KEYS else values for entry in entries))
    allocation = Allocation(layers, ("fp32",) * len(layers)).with_cache(cache)
    folder = tmp_path / "out"
    export(model, allocation, folder, to="gguf")
    target = TARGETS.named("gguf")
    write_card(folder, title="Small", target=target, rows=(), words=(), settings={}, cache=cache)
    served, rounded, floats = torch.tensor(ask(folder, TOKENS)["losses"]), *(
        losses_of(simulate(model, one, trainable=False)) for one in (allocation, allocation.with_cache(None))
    )  # fmt: skip
    expected, seen = ((one - floats).square().mean().sqrt().item() for one in (rounded, served))
    assert 0.6 * expected < seen < 1.5 * expected + 0.001  # llama.cpp's difference in floating point


@torch.no_grad()
def losses_of(model):
    logits = model(TOKENS).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), TOKENS[:, 1:], reduction="none")
