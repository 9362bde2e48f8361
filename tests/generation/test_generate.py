import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from experiments.models.model_cases import CASES
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.generation.batch import generate_batch
from mpq.generation.generate import choose, compare_speeds, generate
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import logits_of, seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model
from tests.sensitivity.small_models import seed_weights

PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **shape)).eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.fixture(scope="module")
def tiny():
    return seed_weights(TinyLM(LMConfig(50, 64, 96, 2)), 0.2).eval()


@pytest.mark.parametrize("name", ["model", "gpt2", "tiny"])
def test_greedy_text_equals_recomputation_without_a_cache(name, request):
    model = request.getfixturevalue(name)
    found = generate(model, PROMPT, max_new_tokens=12)
    sequence = PROMPT
    for _ in range(12):
        with torch.no_grad():
            sequence = torch.cat([sequence, logits_of(model(sequence[None]))[0, -1].argmax()[None]])
    assert found.tokens == tuple(sequence[5:].tolist())
    assert found.tokens_per_second > 0


@pytest.mark.parametrize(
    ("name", "embedding"), [("model", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("tiny", "embed")]
)
def test_positions_are_computed_once(name, embedding, request):
    model, lengths = request.getfixturevalue(name), []
    hook = model.get_submodule(embedding).register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    try:
        generate(model, PROMPT, max_new_tokens=4)
    finally:
        hook.remove()
    assert lengths == [5, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["Mamba", "Gemma 3", "Falcon", "Bloom", "Mixtral", "Phi-3", "Qwen3", "GPT-NeoX", "DeepSeek-V3"]
)
def test_every_causal_model_generates_from_packed_weights(name):
    model = CASES[name].build()
    layers = find_layers(model, exclude=() if name != "Mamba" else "*mixer*")
    packed = pack_model(model, Allocation(layers, ("int8-channel",) * len(layers)))
    sequence, prompt = PROMPT + 5, PROMPT + 5
    for _ in range(6):
        with torch.no_grad():
            sequence = torch.cat([sequence, logits_of(packed(sequence[None]))[0, -1].argmax()[None]])
    found = generate(packed, prompt, max_new_tokens=6)
    assert found.tokens == tuple(sequence[5:].tolist())
    assert found.tokens_per_second > 0
    stopped = generate(packed, prompt, max_new_tokens=6, stop={found.tokens[2]}).tokens
    assert stopped == found.tokens[: found.tokens.index(found.tokens[2]) + 1]


def test_sampling_follows_its_seed_and_top_one_is_greedy(model):
    once, again, other = (generate(model, PROMPT, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2))
    assert once == again != other
    assert generate(model, PROMPT, temperature=2.0, top_k=1).tokens == generate(model, PROMPT).tokens


def test_the_temperature_sharpens_or_flattens_the_choice():
    """Of logits 0 and 1 the second comes with probability 1 / (1 + exp(-1 / temperature))."""
    logits, random = torch.tensor([0.0, 1.0]), seeded(0)
    for temperature in (0.2, 1.0, 5.0):
        share = sum(choose(logits, temperature, 0, random) for _ in range(2000)) / 2000
        expected = 1 / (1 + math.exp(-1 / temperature))
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_stops_at_a_stop_token(model):
    whole = generate(model, PROMPT, max_new_tokens=8).tokens
    stopped = generate(model, PROMPT, max_new_tokens=8, stop={whole[3]}).tokens
    assert stopped == whole[: whole.index(whole[3]) + 1]


def test_an_empty_prompt_is_an_error(model):
    with pytest.raises(MpqError, match="prompt"):
        generate(model, PROMPT[:0])


def test_speeds_of_several_models(model):
    assert set(compare_speeds({"a": model, "b": model}, PROMPT, max_new_tokens=4, rounds=2)) == {"a", "b"}


@pytest.mark.parametrize(
    "option", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"max_new_tokens": -5}], ids=str
)
def test_invalid_numbers_are_refused(model, option):
    (name,) = option
    for call in (lambda: generate(model, PROMPT, **option), lambda: generate_batch(model, [PROMPT], **option)):
        with pytest.raises(MpqError, match=f"invalid {name} .*: expected a finite number of at least 0"):
            call()
