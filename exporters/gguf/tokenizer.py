"""Writing a tokenizer's vocabulary for llama.cpp."""

import json
import logging
from typing import Any

log = logging.getLogger(__name__)

# Pre-tokenization of a byte-level BPE: llama.cpp's name for each pattern that it supports.
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    GPT2_PIECES: "gpt-2",
    _CASELESS % "{1,3}": "llama-bpe",
    _CASELESS % "": "qwen2",
}


def describe_tokenizer(writer: Any, tokenizer: Any, vocab_size: int, gguf: Any) -> None:
    """Write a transformers tokenizer: a byte-level BPE with a pre-tokenizer that llama.cpp supports, or Llama 2's.

    Without one, or with one of another kind (a warning), the file has no vocabulary: llama.cpp then works on token ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(backend.to_str())
    model = described["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())]
    pattern = _pattern(described["pre_tokenizer"])
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    if model["type"] == "BPE" and pattern is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pattern)
        writer.add_token_merges(merges)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        # Sentencepiece joins the pair whose result scores highest: the first merge is the best.
        scores = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([scores.get(token, -1e6) for token in tokens])
        writer.add_add_space_prefix(_starts_with_space(described))
    else:
        log.warning(
            "llama.cpp knows Llama 2's tokenizer and byte-level BPE cut as GPT-2, Llama 3, Qwen 2 or SmolLM do, not "
            "this %s: the file has no vocabulary, feed llama.cpp tokens", model["type"],
        )  # fmt: skip
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_token_list([token if token is not None else f"[unused{i}]" for i, token in enumerate(tokens)])
    writer.add_token_types([_kind(i, token, tokenizer, gguf.TokenType) for i, token in enumerate(tokens)])
    for name in ("bos", "eos", "unk"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    starts = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(starts)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _starts_with_space(described: dict[str, Any]) -> bool:
    """Whether a space is put before a text: by the normalizer, or by the pre-tokenizer (Mistral's later tokenizers)."""
    cutting = described["pre_tokenizer"] or {}
    ahead = cutting.get("type") == "Metaspace" and cutting.get("prepend_scheme", "always") != "never"
    return ahead or "Prepend" in json.dumps(described["normalizer"])


def _kind(number: int, token: str | None, tokenizer: Any, kinds: Any) -> int:
    if token is None:
        return int(kinds.UNUSED)
    if number == tokenizer.unk_token_id:
        return int(kinds.UNKNOWN)
    if number in tokenizer.all_special_ids:
        return int(kinds.CONTROL)
    return int(kinds.BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else kinds.NORMAL)


def _pattern(cutting: Any) -> str | None:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer; None for other tokenizers and pre-tokenizers."""
    if cutting is None:
        return None
    steps = cutting["pretokenizers"] if cutting["type"] == "Sequence" else [cutting]
    if steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    kinds = [step["type"] for step in steps[:-1]]
    if not kinds:
        return "gpt-2" if steps[-1].get("use_regex", True) else None
    if kinds == ["Digits"] and steps[0].get("individual_digits") and steps[-1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split"]:
        return SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None
