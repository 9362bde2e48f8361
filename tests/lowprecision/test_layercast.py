import copy

import pytest
import torch
from mixes import mixed_allocation
from torch import nn
from torch.nn import functional

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.lowprecision.layercast import LayerCast, layercast
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model, simulate


def cast_of(layer):
    return layercast(nn.Sequential(layer))[0]


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_float32_product_of_bfloat16_weights(bias):
    linear = nn.Linear(40, 24, bias=bias)
    own = copy.deepcopy(linear)
    cast, inputs = cast_of(linear), torch.randn(3, 5, 40, generator=seeded(0))
    stored = [None if p is None else p.detach().bfloat16().float() for p in (own.weight, own.bias)]
    assert torch.equal(cast(inputs), functional.linear(inputs, *stored))
    assert torch.equal(cast(inputs.bfloat16()), functional.linear(inputs.bfloat16().float(), *stored))
    assert sum(p.numel() * p.element_size() for p in cast.parameters()) == 2 * sum(p.numel() for p in own.parameters())
    assert not any(p.requires_grad for p in cast.parameters())
    outputs = cast(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(inputs), outputs)


def test_its_state_loads_into_plain_layers_and_back():
    linear = nn.Linear(8, 4)
    own = linear.weight.detach().clone()
    cast, fresh, plain = cast_of(linear), cast_of(nn.Linear(8, 4)), nn.Linear(8, 4)
    fresh.load_state_dict(cast.state_dict())
    plain.load_state_dict(cast.state_dict())
    assert torch.equal(fresh.weight, cast.weight)
    assert fresh.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, own.bfloat16().float())


def test_a_model_computes_as_its_bfloat16_checkpoint_does_in_float32():
    model = TinyLM(LMConfig(64, 32, 48, 2, 4, 2)).bfloat16()
    tokens = torch.randint(0, 64, (2, 9), generator=seeded(1))
    exact = copy.deepcopy(model).float()
    cast = layercast(model, exclude="head")
    assert isinstance(cast.blocks[1].mlp.up_proj, LayerCast)
    assert not isinstance(cast.head, LayerCast)
    assert cast.head.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(cast(tokens), exact(tokens))
    with pytest.raises(MpqError, match="no linear layer, convolution or embedding"):
        layercast(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convolutions_embeddings_and_tied_weights_stay_in_16_bits(dtype):
    model = nn.ModuleDict({
        "embed": nn.Embedding(12, 8), "conv": nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        "image": nn.Conv2d(8, 8, 3, stride=2), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 12, bias=False),
    }).to(dtype)  # fmt: skip
    model["head"].weight = model["embed"].weight
    exact = copy.deepcopy(model).bfloat16() if dtype == torch.float32 else copy.deepcopy(model)
    exact.float()
    if dtype == torch.float32:
        exact["norm"].load_state_dict(model["norm"].state_dict())
    layercast(model)
    assert model["head"].weight is model["embed"].weight
    short = torch.bfloat16 if dtype == torch.float32 else dtype
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("norm")} == {short}
    assert model["norm"].weight.dtype == torch.float32

    def run(parts):
        hidden = parts["conv"](parts["embed"](torch.arange(12).view(2, 6)).transpose(1, 2)).transpose(1, 2)
        image = parts["image"](hidden.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 5))
        return parts["head"](parts["norm"](hidden)), image

    for ours, expected in zip(run(model), run(exact), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)
    model.double().float()
    assert model["head"].weight.dtype == short
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(run(model)[0], run(exact)[0])


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "nvfp4", "int4-g32+a:int8-token", "mix"])
def test_packed_models_stay_packed_and_compute_in_float32(scheme):
    model = TinyLM(LMConfig(64, 32, 48, 2, 4, 2))
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=seeded(2, name)) + (parameter.ndim == 1)
    layers = find_layers(model)
    allocation = mixed_allocation(model) if scheme == "mix" else Allocation(layers, (scheme,) * len(layers))
    packed, exact = pack_model(model, allocation), simulate(model, allocation, trainable=False)
    nbytes = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    for source in (packed, copy.deepcopy(packed).bfloat16()):
        cast = layercast(source)
        assert sum(buffer.numel() * buffer.element_size() for buffer in cast.buffers()) <= nbytes
        tokens = torch.randint(0, 64, (2, 9), generator=seeded(1))
        with torch.no_grad():
            ours = cast(tokens)
            if source is packed:
                torch.testing.assert_close(ours, exact(tokens), rtol=1e-4, atol=1e-4)
            assert ours.dtype == torch.float32
            alone = torch.cat([cast(row) for row in tokens.split(1)])
        assert (ours - alone).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma3"])
def test_models_of_transformers(kind):
    """Gemma's embedding has its own forward: its weight, which the head shares, is float32 in both."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": True}  # fmt: skip
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=1)
    elif kind == "Llama":
        config = transformers.LlamaConfig(**sizes)
    else:
        config = transformers.Gemma3TextConfig(**sizes, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().bfloat16()
    exact, cast = copy.deepcopy(model).float(), layercast(model)
    tokens, mask = torch.randint(0, 50, (2, 7), generator=seeded(4)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        ours, expected = (one(tokens, attention_mask=mask).logits for one in (cast, exact))
    assert torch.equal(ours, expected)
    short = {name for name, p in cast.named_parameters() if p.dtype == torch.bfloat16}
    assert len(short) > 4
    assert any("embed" in name or "wte" in name for name in short) == (kind != "Gemma3")
