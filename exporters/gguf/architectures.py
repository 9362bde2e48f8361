"""Architectures of llama.cpp by transformers' `model_type` (llama.cpp's own conversion of July 2026): hyperparameters,
the order of some rows, and what is added to norms.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpq.core.errors import MpqError

log = logging.getLogger(__name__)

GEMMA_PATTERN = 6  # every sixth layer of Gemma 3 attends to all tokens
GEMMAS_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}  # layers of the ones whose queries are scaled by width / heads


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes one kind of model.

    Attributes:
        name: llama.cpp's.
        pairs_neighbours: its rotary positions pair neighbouring features, transformers' the halves of a head.
        norm_shift: added to the weights of norms.
        windows: it knows layers that attend to the latest tokens alone.
    """

    name: str
    pairs_neighbours: bool = False
    norm_shift: float = 0.0
    windows: bool = False


ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), Architecture("llama", pairs_neighbours=True)),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma2": Architecture("gemma2", norm_shift=1.0, windows=True),
    "gemma3_text": Architecture("gemma3", norm_shift=1.0, windows=True),
    "phi3": Architecture("phi3"),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config that `check_config` passed."""
    return ARCHITECTURES[config.model_type]


def check_config(config: Any) -> None:
    """MpqError for features that llama.cpp computes differently; a warning for unsupported windows."""
    kind = rotation(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope", "su"):
        raise MpqError(f"llama.cpp does not support rotary embeddings of type {kind!r}: export to mpq instead")
    if getattr(config, "num_experts", None) and (
        not getattr(config, "norm_topk_prob", True)
        or getattr(config, "mlp_only_layers", None)
        or getattr(config, "decoder_sparse_step", 1) != 1
    ):
        raise MpqError("llama.cpp requires experts in every layer and routing weights that sum to one: export to mpq")
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale and config.num_hidden_layers != GEMMAS_BY_WIDTH.get(config.model_type) and scale != head_size(config):
        raise MpqError(f"llama.cpp scales Gemma's queries by the head's {head_size(config)} features, not by {scale}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and not architecture_of(config).windows and _slides(config):
        log.warning("llama.cpp ignores this model's sliding window of %d tokens: keep contexts below that", window)


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "use_sliding_window", True))


def head_size(config: Any) -> int:
    """Features of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation(config: Any) -> dict[str, Any]:
    """Rotary positions of the layers that attend to all tokens."""
    nested = getattr(config, "rope_parameters", None) or {}
    whole: dict[str, Any] = nested.get("full_attention", nested)
    return whole


def rotated(config: Any) -> int:
    """Features of a head that rotate."""
    return int(head_size(config) * float(rotation(config).get("partial_rotary_factor", 1.0)))


def describe(writer: Any, config: Any, gguf: Any) -> None:
    """Write the hyperparameters of a transformers config."""
    head = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotated(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe_rotation(writer, config, gguf)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    if config.model_type.startswith("gemma"):
        _describe_gemma(writer, config)


def _describe_gemma(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    whole = [kind != "sliding_attention" for kind in config.layer_types]
    if config.model_type == "gemma3_text":
        if whole != [index % GEMMA_PATTERN == GEMMA_PATTERN - 1 for index in range(len(whole))]:
            writer.add_sliding_window_pattern([not full for full in whole])
    else:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _describe_rotation(writer: Any, config: Any, gguf: Any) -> None:
    rope = rotation(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    nested = getattr(config, "rope_parameters", None) or {}
    if "sliding_attention" in nested and config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(float(nested["sliding_attention"]["rope_theta"]))
    kinds = {"linear": "LINEAR", "yarn": "YARN", "longrope": "LONGROPE", "su": "LONGROPE"}
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[kinds[kind]])
    if kinds[kind] != "LONGROPE":
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_length(config))
    elif kinds[kind] == "LONGROPE":
        original = _original_length(config)
        stretch = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or factor))


def _original_length(config: Any) -> int:
    own = rotation(config).get("original_max_position_embeddings")
    return int(own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def further_tensors(config: Any) -> dict[str, Tensor]:
    """Factors of the rotary frequencies, float32 (features / 2,), by llama.cpp's names."""
    rope = rotation(config)
    kind = rope.get("rope_type", "default")
    if kind in ("longrope", "su"):
        return {
            f"rope_factors_{one}.weight": torch.tensor(rope[f"{one}_factor"], dtype=torch.float32)
            for one in ("long", "short")
        }
    if kind != "llama3":
        return {}
    width = rotated(config)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    lengths, low, high = 2 * math.pi / frequencies, rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((_original_length(config) / lengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}


def row_order(name: str, config: Any) -> Tensor | None:
    """Order of a layer's rows (and biases) in the file, None if unchanged."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None or not architecture_of(config).pairs_neighbours:
        return None
    half = head_size(config) // 2
    return torch.arange(2 * half * heads).reshape(heads, 2, half).transpose(1, 2).reshape(-1)
