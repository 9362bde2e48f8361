"""Small language models of several architectures that cache keys and values."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from mpq.models.tiny_lm import LMConfig, TinyLM

TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, **KV),
    "mistral": MistralConfig(**SHAPE, **KV, sliding_window=5),
    "gemma2": Gemma2Config(**SHAPE, **KV, head_dim=8, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "tiny-lm":
        return TinyLM(LMConfig(vocabulary=50, width=32, hidden=48, layers=2, heads=4, kv_heads=2)).eval()
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
