"""The bundled language model as transformers' Llama: the same weights under the names that other programs know."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}


def tiny_llama(model: nn.Module) -> LlamaForCausalLM:
    """Transformers' Llama with the weights of a `mpq.models.tiny_lm.TinyLM`.

    The maximum position exceeds the training context: vLLM needs room for a token after a full window.
    """
    own = model.config
    config = LlamaConfig(
        vocab_size=own.vocabulary, hidden_size=own.width, intermediate_size=own.hidden, num_hidden_layers=own.layers,
        num_attention_heads=own.heads, num_key_value_heads=own.kv_heads, max_position_embeddings=2 * own.context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    state = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): each for name, each in model.state_dict().items()
    }
    llama.load_state_dict(state)
    return llama.eval()
