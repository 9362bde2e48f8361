"""Lines of `llama-quantize --tensor-type-file`: a regular expression over ggml's tensor names, and a type."""

import re
from collections.abc import Mapping, Sequence

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool
from mpq.exporters.rules import GGUF_FALLBACKS, GGUF_TYPES, gguf_block

LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _spell(format: Format) -> Spelling | None:
    kind = GGUF_TYPES.get(format.name)
    return None if kind is None else {"type": kind.lower()}


def tensor_name(layer: str) -> str:
    """ggml's name of a layer of a Llama-like model, without ".weight"; MpqError for any other layer."""
    if (match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", layer)) and match[2] in LLAMA_NAMES:
        return f"blk.{match[1]}.{LLAMA_NAMES[match[2]]}"
    for ending, name in (("embed_tokens", "token_embd"), ("lm_head", "output")):
        if layer.rpartition(".")[2] == ending:
            return name
    raise MpqError(f"llama-quantize supports only Llama-like layers, not {layer}: export to gguf instead")


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    lines = []
    for name, spelling in spellings.items():
        kind = "bf16" if spelling is None else spelling["type"]
        lines.append(f"^{re.escape(tensor_name(name))}\\.weight$={kind}")
    return "\n".join(lines) + "\n"


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    rules = [line.strip().rpartition("=") for line in text.splitlines() if line.strip()]
    spellings: dict[str, Spelling | None] = {}
    for layer in layers:
        name = f"{tensor_name(layer)}.weight"
        kinds = [kind.lower() for expression, _, kind in rules if re.search(expression, name)]
        floats = not kinds or kinds[-1] in ("bf16", "f16", "f32")
        spellings[layer] = None if floats else {"type": kinds[-1]}
    return spellings


LLAMA_QUANTIZE = Tool(
    "llama-quantize", "tensor-type file", _spell, _write, _read, ("linear", "embedding"), block=gguf_block, fuses=False,
    fallbacks=GGUF_FALLBACKS,
)  # fmt: skip
