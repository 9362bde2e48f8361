import torch

from mpq.models.tiny_lm import LMConfig, TinyLM, rotate, rotations
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers

SMALL = LMConfig(vocabulary=300, width=32, hidden=48, layers=2, heads=4, kv_heads=2)


def test_it_is_transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = TinyLM(SMALL).eval()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    renamed = {
        "embed.": "model.embed_tokens.", "blocks.": "model.layers.", ".attention.": ".self_attn.",
        ".attention_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm.",
    }  # fmt: skip
    state = {}
    for name, tensor in ours.state_dict().items():
        target = "model.norm.weight" if name == "norm.weight" else name.replace("head.", "lm_head.")
        for old, new in renamed.items():
            target = target.replace(old, new) if not target.startswith("lm_head") else target
        state[target] = tensor
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 300, (2, 40), generator=seeded(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_it_sees_no_future():
    model = TinyLM(SMALL).eval()
    tokens = torch.randint(0, 300, (1, 20), generator=seeded(1))
    changed = tokens.clone()
    changed[0, 12:] = 7
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12])


def test_rotations_keep_lengths_and_depend_on_distance():
    x = torch.randn(1, 1, 9, 16, generator=seeded(2))
    cos, sin = rotations(9, 16, x)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    same = rotate(x[:, :, :1].expand(-1, -1, 9, -1), cos, sin)[0, 0]
    products = same @ same.T
    torch.testing.assert_close(products.diagonal(1), products[0, 1].expand(8))


def test_serving_kernels_would_fuse_its_siblings():
    layers = {layer.name: layer for layer in find_layers(TinyLM(SMALL))}
    assert layers["blocks.1.attention.k_proj"].tie == "blocks.1.attention.qkv"
    assert layers["blocks.0.mlp.up_proj"].tie == "blocks.0.mlp.gate_up"
    assert layers["embed"].aliases == ("head",)
