"""Which models `decoder.step` computes: their modules, rotations, windows and norms, by architecture."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.generation.decoder import Block, Decoder
from mpq.models.tiny_lm import TinyLM, rotations

LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")
GEMMA = "Gemma3ForCausalLM"
FIXED = ("default", "linear", "llama3", "yarn")  # rotations that do not change with the length of the text
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


def decoder_of(model: nn.Module) -> Decoder | None:
    """The parts of the bundled TinyLM or of a Llama, Mistral, Qwen2, Qwen3, Phi-3 or Gemma 3 of transformers.

    None for other models. Rotations that change with the length of the text ("dynamic", "longrope") are left to the
    model's own code.
    """
    if isinstance(model, TinyLM):
        width = model.config.width // model.config.heads
        blocks = tuple(_blocks(model.blocks, "attention", ("attention_norm", "mlp_norm")))
        return Decoder(
            model.embed, blocks, model.norm, model.head, width, 1e-5, lambda time, like: rotations(time, width, like)
        )
    name = type(model).__name__
    if name not in (*LLAMAS, GEMMA) or not type(model).__module__.startswith("transformers."):
        return None
    config: Any = model.config
    return _gemma(model, config) if name == GEMMA else _llama(model, config)


def _llama(model: Any, config: Any) -> Decoder | None:
    body = model.model
    if config.hidden_act != "silu" or body.rotary_emb.rope_type not in FIXED:
        return None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if len(kinds) > 1:
        return None
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    blocks = tuple(_blocks(body.layers, "self_attn", ("input_layernorm", "post_attention_layernorm"), window))
    width = body.layers[0].self_attn.head_dim
    positions = partial(_positions, body.rotary_emb)
    return Decoder(body.embed_tokens, blocks, body.norm, model.lm_head, width, config.rms_norm_eps, positions)


def _gemma(model: Any, config: Any) -> Decoder | None:
    body, types = model.model, config.layer_types
    ropes = {body.rotary_emb.rope_type[kind] for kind in set(types)}
    softcaps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if config.hidden_activation not in ACTIVATIONS or not ropes <= set(FIXED) or any(softcaps):
        return None
    if config.use_bidirectional_attention:
        return None
    norms = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    blocks = tuple(_blocks(body.layers, "self_attn", norms, windows))
    mix = body.layers[0].self_attn
    positions = {kind: partial(_positions, body.rotary_emb, kind=kind) for kind in types}
    local: Any = positions.get("sliding_attention")
    return Decoder(
        body.embed_tokens, blocks, body.norm, model.lm_head, mix.head_dim, config.rms_norm_eps,
        positions.get("full_attention", local), local,
        ACTIVATIONS[config.hidden_activation], mix.scaling, own_norms=True,
    )  # fmt: skip


def _positions(rotary: Any, time: int, like: Tensor, kind: str = "") -> tuple[Tensor, Tensor]:
    where = torch.arange(time, device=like.device).unsqueeze(0)
    cos, sin = rotary(like, where, kind) if kind else rotary(like, where)
    return cos[0], sin[0]


def _blocks(layers: Any, attention: str, norms: tuple[str, ...], windows: Any = None) -> Iterator[Block]:
    for index, layer in enumerate(layers):
        mix, mlp = getattr(layer, attention), layer.mlp
        window = windows[index] if isinstance(windows, list) else windows
        first, second, *after = (getattr(layer, name) for name in norms)
        fused = None
        if hasattr(mix, "qkv_proj"):
            q = k = v = mix.qkv_proj
            keys = mix.num_key_value_heads * mix.head_dim
            fused = (mix.config.num_attention_heads * mix.head_dim, keys, keys)
            gate = up = mlp.gate_up_proj
        else:
            q, k, v, gate, up = mix.q_proj, mix.k_proj, mix.v_proj, mlp.gate_proj, mlp.up_proj
        yield Block(
            first, q, k, v, mix.o_proj, second, gate, up, mlp.down_proj,
            getattr(mix, "q_norm", None), getattr(mix, "k_norm", None),
            after_attention=after[0] if after else None, after_mlp=after[1] if after else None, fused=fused,
            window=window, local=isinstance(windows, list) and window is not None,
        )  # fmt: skip
