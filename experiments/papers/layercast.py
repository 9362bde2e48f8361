"""How much a language model's greedy answers depend on the order of sums, by precision (arXiv 2506.09501).

Configurations differ in how many chunks each product is summed in, as devices, batch sizes and parallel widths do; the
precisions are bfloat16, float16, LayerCast (bfloat16 weights, float32 arithmetic) and float32. The weights' values are
bfloat16's in all of them. `--quick` takes few prompts and tokens.
"""

import argparse
import copy
import sys

import numpy as np
import torch
from torch import nn

from experiments.models.reference_models import wikitext_llama, wikitext_tokens
from mpq.core.errors import MpqError
from mpq.lowprecision.divergence import average_std_of_probability, divergence_indices, generate
from mpq.lowprecision.layercast import layercast
from mpq.lowprecision.reduction import in_chunks

CHUNKS = (1, 2, 4, 8)
PRECISIONS = ("bfloat16", "float16", "LayerCast", "float32")


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """A copy; its weights' values are bfloat16 already."""
    model = copy.deepcopy(model)
    if precision == "LayerCast":
        return layercast(model)
    return model.to(getattr(torch, precision))


def result(name: str, value: float, goal: str, reached: bool) -> str:
    return f"RESULT {name} {value:.3g} {goal} {'ok' if reached else 'short'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 prompts, 8 tokens")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts, tokens = (4, 8) if options.quick else (options.prompts, options.tokens)
    try:
        model = wikitext_llama().bfloat16().float()
        text = wikitext_tokens("test", prompts, 32)
    except MpqError as error:
        sys.exit(f"skipped: {error}")
    print(f"{prompts} prompts of 32 tokens, {tokens} greedy tokens each; products summed in {CHUNKS} chunks")
    print(f"{'':12}{'Avg_Std@top1_prob':>18}{'diverged':>10}{'median Div_Index':>18}{'weight bytes':>14}")
    spread, diverged = {}, {}
    for precision in PRECISIONS:
        cast = in_precision(model, precision)
        runs = [generate(in_chunks(cast, chunks), text, tokens) for chunks in CHUNKS]
        indices = [index for index in divergence_indices(runs) if index is not None]
        spread[precision] = average_std_of_probability(runs)
        diverged[precision] = len(indices) / prompts
        size = sum(p.numel() * p.element_size() for p in cast.parameters())
        median = f"{np.median(indices):.0f}" if indices else "-"
        print(
            f"{precision:12}{spread[precision]:>18.2e}{diverged[precision]:>10.3f}{median:>18}{size:>14,}", flush=True
        )
    ordered = spread["bfloat16"] > spread["float16"] > spread["LayerCast"]
    lines = [
        result("layercast_std_over_bfloat16s", spread["LayerCast"] / spread["bfloat16"], "<0.001",
               spread["LayerCast"] < 1e-3 * spread["bfloat16"]),
        result("layercast_std_over_float32s", spread["LayerCast"] / spread["float32"], "<2",
               spread["LayerCast"] < 2 * spread["float32"]),
        result("layercast_order_bf16_fp16_layercast", float(ordered), "=1", ordered),
        result("layercast_diverged", diverged["LayerCast"], "<0.034", diverged["LayerCast"] < 0.034),
        result("bfloat16_diverged", diverged["bfloat16"], ">layercast", diverged["bfloat16"] > diverged["LayerCast"]),
    ]  # fmt: skip
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
