"""Tokens per second of our checkpoints in vLLM, 1 to 128 sequences at once, against the same model in bfloat16.

    python -m experiments.peers.vllm_throughput --vllm PYTHON [--quick] [--scheme int4-g128]

Llama shapes of 1.2 billion parameters with random weights, served by `vllm.LLM(folder)`; `--vllm` names the Python of
an environment where this package is importable, for its plugin. `--quick` takes two blocks and two batches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.benchmarks.bench_generate import SHAPES
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.network.layers import find_layers

BATCHES = (1, 4, 16, 32, 64, 128)
SECONDS = 280  # time limit of each


def speeds(python: str, folder: Path, batches: tuple[int, ...]) -> dict[int, float]:
    """Tokens per second by batch; empty, with vLLM's output printed, if vLLM fails."""
    script = Path(__file__).with_name("vllm_speed.py")
    command = [python, str(script), str(folder), *map(str, batches)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"vLLM took more than {SECONDS} s on {folder.name}")
        return {}
    if done.returncode:
        print(f"vLLM failed on {folder.name} with {done.returncode}: {done.stderr[-500:]}")
        return {}
    return {int(batch): speed for batch, speed in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--scheme", default="int4-g128", help="of every layer but embeddings")
    parser.add_argument("--quick", action="store_true", help="two blocks, small vocabulary, two batches")
    options = parser.parse_args()
    if not options.vllm:
        print("skipped: --vllm names no Python with vLLM")
        sys.exit(0)
    shapes = {**SHAPES, "num_hidden_layers": 2, "vocab_size": 8192} if options.quick else SHAPES
    batches = BATCHES[:2] if options.quick else BATCHES
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**shapes))
    layers = find_layers(model)
    schemes = tuple("bf16" if layer.kind == "embedding" else options.scheme for layer in layers)
    with tempfile.TemporaryDirectory() as name:
        plain, ours = Path(name) / "bf16", Path(name) / "mpq"
        model.save_pretrained(plain)
        export(model, Allocation(layers, schemes), ours, method="nearest")
        found = [speeds(options.vllm, folder, batches) for folder in (plain, ours)]
    for batch in sorted(found[0].keys() & found[1].keys()):
        base, speed = (one[batch] for one in found)
        print(f"batch {batch}: bfloat16 {base:.0f}, {options.scheme} {speed:.0f} tokens per second")
        print(result(f"vllm_throughput/{options.scheme}/batch{batch}", speed / base, ">=1", speed >= base))


if __name__ == "__main__":
    main()
