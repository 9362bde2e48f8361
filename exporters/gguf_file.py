"""GGUF, the file of llama.cpp: each layer in the tensor type that holds exactly its format's numbers."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.rounding import Quantized
from mpq.exporters.consumers import CONSUMERS, check
from mpq.exporters.folder import refuse_foreign, write_checksums, write_folder
from mpq.exporters.gguf_blocks import encode_blocks, raw_copy
from mpq.exporters.state import other_state
from mpq.quantized import Moments, quantized_layers

FILE = "model.gguf"


def export(
    model: nn.Module,
    allocation: Allocation,
    folder: str | os.PathLike[str],
    *,
    method: str = "mse",
    second_moments: Moments | None = None,
    recipe: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a transformers Llama as `model.gguf`; the folder.

    Args:
        model: a LlamaForCausalLM; the others are as in `mpq.exporters.checkpoint.export`.
        recipe: not needed, the file describes the model itself.
        tokenizer: a byte-level BPE tokenizer of transformers to put into the file. Without one the file has no
            vocabulary: llama.cpp then takes and gives tokens alone.

    Raises:
        MpqError: no Llama, a scheme without a tensor type, a tokenizer of another kind, the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise MpqError("GGUF files are written with the package gguf: pip install 'mpq[gguf]'") from error
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llama":
        raise MpqError(f"GGUF export knows transformers' Llama models, not {type(model).__name__}")
    check(CONSUMERS["gguf"], allocation)
    refuse_foreign(folder, (FILE, "allocation.json"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with write_folder(folder) as draft:
        writer = gguf.GGUFWriter(draft / FILE, "llama", use_temp_file=True)
        _describe(writer, config, gguf, tokenizer)
        for name, tensor in _others(model, allocation):
            stem, _, ending = name.rpartition(".")
            values = tensor.float() if tensor.ndim == 1 else tensor
            content, kind = raw_copy(values, gguf)
            writer.add_tensor(f"{_translated(names, stem)}.{ending}", content, raw_dtype=kind)
        for layer, _, quantized in quantized_layers(model, allocation, method, second_moments):
            leaf = layer.name.rpartition(".")[2]
            rows = _interleaved(layer.rows, heads[leaf]) if leaf in heads else None
            arranged = quantized if rows is None else _rows_of(quantized, rows)
            content, kind = encode_blocks(arranged, gguf)
            writer.add_tensor(f"{_translated(names, layer.name)}.weight", content, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        allocation.save(draft / "allocation.json")
        write_checksums(draft, {})
    return Path(folder)


def _others(model: nn.Module, allocation: Allocation) -> Iterator[tuple[str, Tensor]]:
    tensors, _ = other_state(model, allocation)
    yield from tensors.items()


def _translated(names: Any, name: str) -> str:
    found = names.get_name(name)
    if found is None:
        raise MpqError(f"llama.cpp's Llama has no place for the tensor {name}")
    return str(found)


def _describe(writer: Any, config: Any, gguf: Any, tokenizer: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise MpqError(f"GGUF export knows plain rotary positions, not {rope['rope_type']!r}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(described["pre_tokenizer"]):
        raise MpqError("GGUF export takes byte-level BPE tokenizers: leave the tokenizer out to feed llama.cpp tokens")
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    control = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token if token is not None else f"[unused{i}]" for i, token in enumerate(vocabulary)])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if i in control else kinds.NORMAL for i in range(config.vocab_size)])
    merges = described["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)


def _interleaved(rows: int, heads: int) -> Tensor:
    """Row order of llama.cpp's rotary positions: they pair neighbours, transformers pairs the halves of a head."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _rows_of(quantized: Quantized, rows: Tensor) -> Quantized:
    by_row = quantized.map_tables(lambda name, table: table[rows])
    return replace(by_row, codes=quantized.codes[rows])
