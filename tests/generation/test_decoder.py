import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from mpq.core.allocation import Allocation
from mpq.generation.architectures import decoder_of
from mpq.generation.decoder import step
from mpq.generation.memory import Memory
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import logits_of, seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model
from tests.sensitivity.small_models import seed_weights

TOKENS = torch.randint(0, 50, (1, 150), generator=seeded(1))
# Two orders of the same float32 sums, through two blocks of width 64 with outputs of order 1.
CLOSE = 1e-4


def llama(kind="Llama", **changes):
    torch.manual_seed(0)
    config, build = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"vocab_size": 50, "max_position_embeddings": 256, "num_key_value_heads": 2, **changes}
    model = build(config(**shape, **rest)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(8)  # peaked attention, logits of order 1
    return model


def gemma(**changes):
    text = transformers.Gemma3TextConfig
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"] * 2
    config = {"head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 4, "layer_types": types, **changes}
    model = transformers.Gemma3ForCausalLM(text(**shape, vocab_size=50, max_position_embeddings=256, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(-0.5, 0.5) if "norm" in name else parameter.mul_(8)
    return model


def tiny():
    return seed_weights(TinyLM(LMConfig(50, 64, 96, 2)), 0.2).eval()


def packed():
    model = llama()
    layers = find_layers(model)
    return pack_model(model, Allocation(layers, ("int4-g32",) * len(layers)))


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
          "original_max_position_embeddings": 64}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MODELS = {
    "llama": llama,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "wide heads": lambda: llama(head_dim=32, tie_word_embeddings=True),
    "scaled rotations": lambda: llama(rope_parameters=SCALED),
    "Mistral": lambda: llama("Mistral", sliding_window=None),
    "Qwen2": lambda: llama("Qwen2"),
    "Qwen3": lambda: llama("Qwen3", head_dim=16),
    "Mistral, window": lambda: llama("Mistral", sliding_window=32),
    "Phi-3": lambda: llama("Phi3", pad_token_id=0),
    "Phi-3, window": lambda: llama("Phi3", pad_token_id=0, sliding_window=20),
    "Phi-4-mini": lambda: llama("Phi3", pad_token_id=0, rope_parameters=PARTIAL),
    "Gemma 3": lambda: gemma(sliding_window=512),
    "Gemma 3, windows": lambda: gemma(sliding_window=16),
    "Gemma 3, windows alone": lambda: gemma(sliding_window=16, layer_types=["sliding_attention"] * 4),
    "Gemma 3, no windows": lambda: gemma(layer_types=["full_attention"] * 4),
    "tiny-lm": tiny,
    "packed": packed,
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_any_size_match_the_models_logits(name):
    model = MODELS[name]()
    decoder, memory, end = decoder_of(model), Memory(), 0
    with torch.inference_mode():
        expected = logits_of(model(TOKENS))[0]
        for size in (5, 1, 1, 90, 1, 3, 49):  # beyond the initial capacity, too
            end += size
            found = step(decoder, TOKENS[:, end - size : end], memory)
            tolerance = CLOSE if name != "packed" else 3e-3  # activations of about 15 bits, twice in each block
            torch.testing.assert_close(found, expected[end - 1], rtol=0, atol=tolerance)
    assert memory.length == end == 150
    assert expected.std() > 0.3


def test_half_precision_stays_close():
    model = llama().bfloat16()
    with torch.inference_mode():
        found = step(decoder_of(model), TOKENS, Memory())
        expected = model(TOKENS).logits[0, -1]
    assert found.dtype == torch.bfloat16
    # Norms round once here and twice there: 2**-8 of the largest activation, a few times over.
    assert (found - expected).abs().max() <= 16 * 2**-8 * expected.abs().max()


def test_unsupported_models_are_not_changed():
    assert decoder_of(gemma(final_logit_softcapping=30.0)) is None
    mixed = ["full_attention", "sliding_attention"]
    assert decoder_of(llama("Qwen2", use_sliding_window=True, sliding_window=9, layer_types=mixed)) is None
    assert decoder_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))) is None
    assert decoder_of(llama(hidden_act="gelu")) is None
    assert decoder_of(llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})) is None
    assert decoder_of(torch.nn.Linear(2, 2)) is None
