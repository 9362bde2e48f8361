"""How much a language model's greedy answers depend on the order of sums, by precision (arXiv 2506.09501).

First simulated: configurations differ in the number of chunks that each product is summed in, as between devices and
parallel widths. Then computed on this machine: batch sizes, padding, threads. Precisions are bfloat16, float16,
LayerCast (bfloat16 weights, float32 arithmetic) and float32; the weights' values are bfloat16 in all of them, or packed
int4-g64. `--quick` takes the bundled model, few prompts and tokens.
"""

import argparse
import copy
import sys

import numpy as np
import torch
from torch import Tensor, nn

from experiments.models.reference_models import wikitext_llama, wikitext_tokens
from experiments.result import result
from mpq import layercast
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.lowprecision.divergence import generate
from mpq.lowprecision.reduction import in_chunks
from mpq.lowprecision.reproducibility import CONFIGURATIONS, Reproducibility, bytes_of, compared, reproducibility
from mpq.models import bundled_model, novel_batches, tokenizer
from mpq.network.layers import find_layers
from mpq.quantized import pack_model

CHUNKS = (1, 2, 4, 8)
PRECISIONS = ("bfloat16", "float16", "layercast", "float32")
PACKED = "int4-g64"


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """A copy; its weights' values are bfloat16 already."""
    model = copy.deepcopy(model)
    return layercast(model) if precision == "layercast" else model.to(getattr(torch, precision))


def table(title: str, found: list[Reproducibility]) -> dict[str, Reproducibility]:
    print(f"\n### {title}\n")
    print("| precision | Avg_Std@top1_prob | largest difference | bit-identical | diverged | median Div_Index | MB |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        indices = [index for index in one.divergence if index is not None]
        median = f"{np.median(indices):.0f}" if indices else "-"
        print(
            f"| {one.precision} | {one.spread:.1e} | {one.largest:.1e} | {one.identical:.0%} | {one.diverged:.1%} | "
            f"{median} | {one.nbytes / 1e6:.2f} |",
            flush=True,
        )
    return {one.precision: one for one in found}


def simulated(model: nn.Module, prompts: Tensor, tokens: int) -> list[Reproducibility]:
    found = []
    for precision in PRECISIONS:
        cast = in_precision(model, precision)
        runs = [generate(in_chunks(cast, chunks), prompts, tokens) for chunks in CHUNKS]
        found.append(compared(precision, runs, bytes_of(cast)))
    return found


def packed(model: nn.Module) -> nn.Module:
    layers = find_layers(model)
    return pack_model(model, Allocation(layers, (PACKED,) * len(layers)), "nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the bundled model, 4 prompts, 6 tokens")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts, tokens = (4, 6) if options.quick else (options.prompts, options.tokens)
    try:
        if options.quick:
            settings = {"seqlen": 32, "batch_size": prompts, "samples": prompts, "seed": 0}
            model, text = bundled_model("tiny-lm"), novel_batches("evaluation", tokenizer().encode, **settings)[0]
        else:
            model, text = wikitext_llama(), wikitext_tokens("test", prompts, 32)
    except MpqError as error:
        sys.exit(f"skipped: {error}")
    model = model.bfloat16().float()
    print(f"{prompts} prompts of 32 tokens, {tokens} greedy tokens each")
    sums = table(f"products summed in {CHUNKS} chunks, simulated", simulated(model, text, tokens))
    ways = "; ".join(one.name for one in CONFIGURATIONS)
    here = table(f"as computed here: {ways}", list(reproducibility(model, text, tokens)))
    table(f"the same with weights in {PACKED}", list(reproducibility(packed(model), text, tokens)))
    short, half, cast, whole = (sums[name] for name in PRECISIONS)
    ordered = short.spread > half.spread > cast.spread
    lines = [
        result("layercast_std_over_bfloat16s", cast.spread / short.spread, "<0.001", cast.spread < 1e-3 * short.spread),
        result("layercast_std_over_float32s", cast.spread / whole.spread, "<2", cast.spread < 2 * whole.spread),
        result("layercast_order_bf16_fp16_layercast", float(ordered), "=1", ordered),
        result("layercast_diverged", cast.diverged, "<0.034", cast.diverged < 0.034),
        result("bfloat16_diverged", short.diverged, ">layercast", short.diverged > cast.diverged),
        result("layercast_here_std", here["layercast"].spread, "<1e-5", here["layercast"].spread < 1e-5),
        result("layercast_here_diverged", here["layercast"].diverged, "<0.034", here["layercast"].diverged < 0.034),
    ]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
