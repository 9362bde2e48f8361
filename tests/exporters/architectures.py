"""Small language models of many architectures with random weights, whose names and rules exporters must handle."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mpq.network.calibration import seeded
from mpq.network.experts import unstack

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 16,
        "query_pre_attn_scalar": 64,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "gemma2": {"num_hidden_layers": 3, "sliding_window": 16, "query_pre_attn_scalar": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
    "phi3": {"head_dim": None},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}


def model_of(kind: str, **changes: object) -> nn.Module:
    """A model of that `model_type`, with weights large enough that rounding and wrong rules both change its logits."""
    settings = {name: value for name, value in {**SIZES, **OWN[kind], **changes}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=seeded(0, name))
            if parameter.ndim == 1:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    return unstack(model)
