import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.core.allocation import Allocation
from mpq.generation.architectures import decoder_of
from mpq.generation.compiled_step import compiled_step
from mpq.generation.decoder import step
from mpq.generation.generate import generate
from mpq.generation.memory import Memory
from mpq.kernels.cpu import native as cpu
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import fuse, pack_model
from tests.mixes import mixed_allocation
from tests.sensitivity.small_models import seed_weights

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")
TOKENS = torch.randint(0, 50, (1, 150), generator=seeded(1))
# Activations become integers, with a step of 2**-16 of the largest, in seven products per block and one more. Two
# orders of the same sums may round some to neighbours. Logits are of order 1.
CLOSE = 3e-3


def packed(model, *schemes):
    """The fused model, its layers in the schemes round-robin."""
    layers = find_layers(model)
    return fuse(pack_model(model, Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))))


def mixed(model, *formats):
    """The model with random formats by row."""
    return fuse(pack_model(model, mixed_allocation(model, formats)))


def tiny(*schemes, width=128, hidden=192, heads=4, kv_heads=2, pack=packed):
    config = LMConfig(50, width, hidden, 2, heads=heads, kv_heads=kv_heads)
    model = TinyLM(config).eval()
    seed_weights(model, 0.1)
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=seeded(0, name))
    return pack(model, *(schemes or ("int4-g64",)))


def llama(*schemes, pack=packed, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6,
             "vocab_size": 50, "max_position_embeddings": 256, "num_key_value_heads": 3, **changes}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_()
            else:
                parameter.mul_(6)
    return pack(model, *(schemes or ("int4-g32",)))


def wide():
    """Attention long enough to be split."""
    return tiny("int4-g128", width=256, hidden=256, heads=8, kv_heads=4)


MODELS = {
    "stacked, tied": tiny,
    "one key head": lambda: tiny("int5-g64-asym", heads=8, kv_heads=1),
    "split attention": wide,
    "odd sizes": llama,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "stacked biases": lambda: llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, attention_bias=True),
    "head width 20": lambda: llama(head_dim=20, tie_word_embeddings=True),
    "formats": lambda: tiny("int3-g32", "nvfp4", "fp8-e4m3-channel", "mxfp4", "nf4-g64", "int8-channel", "int2-g64"),
    "mixes": lambda: tiny("int2-g64", "int3-g64", "int4-g64", pack=mixed),
    "mixes, odd sizes and biases": lambda: llama(
        "int3-g4", "nf4-g32", "int8-channel", pack=mixed, attention_bias=True, mlp_bias=True),
    "more parts than one call takes": lambda: tiny(*(f"int{bits}-g64" for bits in range(2, 9)), pack=mixed),
}  # fmt: skip


@pytest.fixture(params=cpu.levels(), ids=lambda i: cpu.LEVELS[i])
def level(request, monkeypatch):
    found = replace(cpu.native(), level=request.param)
    monkeypatch.setattr(cpu, "native", lambda: found)


def logits_of_steps(model, compiled=True):
    """The logits after each of the tokens from the fifth on, one at a time: (tokens, vocabulary)."""
    decoder, memory, found = decoder_of(model), Memory(), []
    take = compiled_step(decoder) if compiled else None
    assert not compiled or take is not None
    with torch.inference_mode():
        step(decoder, TOKENS[:, :4], memory)
        for end in range(5, TOKENS.shape[1] + 1):
            token = TOKENS[:, end - 1 : end]
            logits = take(token, memory) if compiled else step(decoder, token, memory)
            assert logits is not None
            assert memory.length == end
            found.append(logits)
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_the_decoder_loops(name, level):
    model = MODELS[name]()
    expected = logits_of_steps(model, compiled=False)
    assert expected.std() > 0.3
    found = logits_of_steps(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits_are_nearer_to_float32_than_the_decoder_loops(name):
    model = MODELS[name]().bfloat16()
    exact = logits_of_steps(copy.deepcopy(model).float(), compiled=False)  # the same weights without rounding
    loop, found = logits_of_steps(model, compiled=False), logits_of_steps(model)
    assert found.dtype == torch.bfloat16
    error, before = ((one.float() - exact).square().mean().sqrt() for one in (found, loop))
    assert error <= before
    # Embedding, rotations, keys, values and logits are rounded: 2**-9 of each, a few times over.
    assert error <= 4 * 2**-9 * exact.abs().max()


def test_integer_activations():
    model = tiny("int4-g64+a:int8-token")
    # One rounding to a neighbour is 1/127 of the largest activation in one of 128 columns of a product.
    torch.testing.assert_close(logits_of_steps(model), logits_of_steps(model, compiled=False), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype, level):
    model, before = wide().to(dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(logits_of_steps(model))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-36])
def test_unsupported_tokens_fall_back_to_the_decoder_loop(value):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens = nn.Embedding.from_pretrained(torch.randn(50, 96, generator=seeded(2)))
        model.model.embed_tokens.weight[7] = value
    decoder, memory, other = decoder_of(model), Memory(), Memory()
    take = compiled_step(decoder)
    with torch.inference_mode():
        for one in (memory, other):
            step(decoder, TOKENS[:, :4], one)
        assert take(torch.tensor([[7]]), memory) is None
        assert memory.length == 4
        for token in (torch.tensor([[7]]), TOKENS[:, 4:5]):  # later tokens attend to it
            expected, found = step(decoder, token, other), take(token, memory)
            assert (found is None) == (token.item() == 7 or not expected.isfinite().all())
            found = step(decoder, token, memory) if found is None else found
            torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE, equal_nan=True)
    texts = [generate(one, torch.tensor([3, 7, 5]), max_new_tokens=5).tokens for one in (model, hooked(model))]
    assert texts[0] == texts[1]


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def changed(change):
    model = llama(attention_bias=True)
    change(model)
    return model


@pytest.mark.parametrize("model", [
    lambda: hooked(llama()),
    lambda: llama().half(),
    lambda: llama("int4-g32", "bf16"),  # unpacked layers
    lambda: llama("int4-g32+a:fp8-e4m3-token"),
    lambda: changed(lambda model: setattr(model.lm_head, "forward", model.lm_head.forward)),
    lambda: changed(lambda model: setattr(model.lm_head, "bias", torch.zeros(50, dtype=torch.float64))),
    lambda: changed(lambda model: model.model.norm.bfloat16()),
    lambda: changed(lambda model: setattr(model, "lm_head", nn.Linear(96, 50))),
    lambda: changed(lambda model: model.model.layers[0].mlp.up_proj.weight.arrange("rows")),
    lambda: seed_weights(TinyLM(LMConfig(50, 64, 96, 2))),
])  # fmt: skip
def test_unsupported_models_fall_back_to_the_decoder_loop(model):
    assert compiled_step(decoder_of(model())) is None


@pytest.mark.parametrize("changes", [
    {"scale": 0.3}, {"own_norms": True}, {"activation": torch.nn.functional.gelu},
    {"blocks": {"window": 8}}, {"blocks": {"after_mlp": nn.RMSNorm(96)}}, {"blocks": {"q_norm": nn.RMSNorm(16)}},
])  # fmt: skip
def test_only_llama_style_steps_are_compiled(changes):
    decoder = decoder_of(llama())
    assert compiled_step(decoder) is not None
    if "blocks" in changes:
        changes = {"blocks": tuple(replace(block, **changes["blocks"]) for block in decoder.blocks)}
    assert compiled_step(replace(decoder, **changes)) is None


def test_autocast_and_prompts_use_the_decoder_loop():
    model = tiny()
    take, memory = compiled_step(decoder_of(model)), Memory()
    with torch.inference_mode():
        assert take(TOKENS[:, :1], memory) is None
        step(decoder_of(model), TOKENS[:, :4], memory)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert take(TOKENS[:, 4:5], memory) is None


def test_a_stack_with_a_replaced_weight_is_unstacked():
    model, other = tiny(), tiny("int4-g64", heads=4)
    for one in (model, other):
        attention = one.blocks[0].attention
        attention.k_proj.load_state_dict({k: v.roll(1, 0) for k, v in attention.k_proj.state_dict().items()})
    torch.testing.assert_close(logits_of_steps(model), logits_of_steps(other, compiled=False), rtol=0, atol=CLOSE)


def test_generation_uses_the_compiled_step():
    model = tiny()
    calls = []
    model.embed.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    with_hook = copy.deepcopy(model)
    with_hook.head.register_forward_hook(lambda *_: None)
    texts = [generate(one, TOKENS[0, :9], max_new_tokens=20).tokens for one in (model, with_hook)]
    assert texts[0] == texts[1]
    assert calls[:20] == [9] + [1] * 19
