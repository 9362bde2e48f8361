"""Apply a configuration of ours to the WikiText Llama in the tool that reads it; run in the tool's environment.

PYTHON -m experiments.peers.peer_emitted modelopt|autoround FILE

JSON on stdout: bits and group size (-1: by channel) of each linear layer in the tool, null if not quantized.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from experiments.models.reference_models import data_file, wikitext_llama, wikitext_tokens

Given = dict[str, list[int] | None]


def modelopt(text: str, model: nn.Module) -> Given:
    import modelopt.torch.quantization as mtq

    settings = yaml.safe_load(text)
    tokens = wikitext_tokens("train", 1)
    mtq.quantize(model, settings, lambda model: model(tokens))
    given: Given = {}
    for name, module in model.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if quantizer is not None:
            sizes = quantizer.block_sizes or {}
            given[name] = [int(quantizer.num_bits), sizes.get(-1, -1)] if quantizer.is_enabled else None
    return given


def autoround(text: str, model: nn.Module) -> Given:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_file("wikitext2_llama_5m"))
    layers = {name: entry for name, entry in json.loads(text).items() if name != "model.embed_tokens"}
    rounding = AutoRound(model, tokenizer, layer_config=layers, iters=0, disable_opt_rtn=True, low_gpu_mem_usage=False)
    _, found = rounding.quantize()
    names = {name for name, module in wikitext_llama().named_modules() if isinstance(module, nn.Linear)}
    return {
        name: None if entry.get("bits", 16) >= 16 else [entry["bits"], entry["group_size"]]
        for name, entry in found.items()
        if name in names
    }


def main() -> None:
    torch.set_num_threads(1)
    tool, file = sys.argv[1:]
    given = {"modelopt": modelopt, "autoround": autoround}[tool](Path(file).read_text("utf-8"), wikitext_llama())
    print("\n" + json.dumps(given))


if __name__ == "__main__":
    main()
