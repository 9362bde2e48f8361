"""FP4 training of a small language model: which scale type, rounding, rotation and scale convention cost how much.

After "Elucidating the design space of FP4 training" (arXiv 2509.17791), with several seeds, unseen text instead of the
least training loss, and both scale conventions, which the paper does not separate. Every linear layer but the output
head runs its three products in the format, simulated. `--quick` trains a few recipes for a few steps.
"""

import argparse
import time

import numpy as np
import torch

from experiments.models.small_lm import train, training_windows, unseen_loss, unseen_windows, untrained
from mpq.core.patterns import match_names
from mpq.lowprecision import convert
from mpq.lowprecision.recipe import Recipe

E4M3, UE5M3 = "fp4-e2m1-g16-se4m3", "fp4-e2m1-g16-sue5m3"
RECIPES: dict[str, Recipe | None] = {
    "full precision": None,
    "mxfp4": Recipe("mxfp4"),
    "mxfp4, SR backward": Recipe("mxfp4", stochastic="backward"),
    "mxfp4, SR and RHT backward": Recipe("mxfp4", stochastic="backward", hadamard="backward"),
    "nvfp4": Recipe("nvfp4"),
    "nvfp4, SR forward": Recipe("nvfp4", stochastic="forward"),
    "nvfp4, SR backward": Recipe("nvfp4", stochastic="backward"),
    "nvfp4, SR and RHT backward": Recipe("nvfp4", stochastic="backward", hadamard="backward"),
    "nvfp4, SR, RHT, square weights": Recipe("nvfp4", stochastic="backward", hadamard="backward", square_weights=True),
    "nvfp4, reciprocal": Recipe("nvfp4", convention="reciprocal"),
    "e4m3 scales alone": Recipe(E4M3),
    "e4m3 scales alone, reciprocal": Recipe(E4M3, convention="reciprocal"),
    "ue5m3 scales alone": Recipe(UE5M3),
    "ue5m3, tensor scale": Recipe(f"{UE5M3}-ts"),
    "ue5m3, tensor scale, SR and RHT": Recipe(f"{UE5M3}-ts", stochastic="backward", hadamard="backward"),
}
QUICK = ("full precision", "nvfp4", "nvfp4, SR backward", "e4m3 scales alone")


def study(names: tuple[str, ...], seeds: int, steps: int) -> dict[str, list[float]]:
    """Unseen loss of each recipe and seed."""
    seen, unseen = training_windows(), unseen_windows()
    losses: dict[str, list[float]] = {name: [] for name in names}
    print(f"{steps} steps, {seeds} seeds; loss of unseen text, gap to full precision (mean +- standard error, paired)")
    for name in names:
        begin = time.perf_counter()
        for seed in range(seeds):
            model, recipe = untrained(seed), RECIPES[name]
            if recipe is not None:
                convert(model, recipe, exclude=("head",), seed=seed)
            train(model, seen, steps, seed=seed)
            losses[name].append(unseen_loss(model, unseen))
        gaps = np.array(losses[name]) - np.array(losses[names[0]])
        error = gaps.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else float("nan")
        print(
            f"{name:34} {np.mean(losses[name]):.3f}   {gaps.mean():+.3f} +- {error:.3f}"
            f"   ({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    return losses


def result(name: str, value: float, reached: bool) -> str:
    return f"RESULT {name} {value:.4f} >0 {'ok' if reached else 'short'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four recipes, one seed, 40 steps")
    parser.add_argument("--recipes", nargs="+", default=["*"], help="patterns of the recipes to train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = match_names(options.recipes, list(RECIPES), "recipe")
    names = QUICK if options.quick else tuple(dict.fromkeys(("full precision", *chosen)))
    losses = study(names, 1 if options.quick else options.seeds, 40 if options.quick else options.steps)
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    base = mean["full precision"]
    smallest = min(value - base for name, value in mean.items() if name != "full precision")
    better = {  # what is expected to win, and against what
        "fp4_sr_backward_gain_nvfp4": ("nvfp4, SR backward", "nvfp4"),
        "fp4_sr_forward_cost_nvfp4": ("nvfp4", "nvfp4, SR forward"),
        "fp4_nvfp4_gain_over_mxfp4": ("nvfp4", "mxfp4"),
        "fp4_tensor_scale_gain_e4m3": ("nvfp4", "e4m3 scales alone"),
        "fp4_tensor_scale_gain_ue5m3": ("ue5m3, tensor scale", "ue5m3 scales alone"),
        "fp4_division_gain_nvfp4": ("nvfp4", "nvfp4, reciprocal"),
    }
    lines = [result("fp4_smallest_gap", smallest, smallest > 0)]
    lines += [
        result(name, mean[other] - mean[winner], mean[winner] < mean[other])
        for name, (winner, other) in better.items()
        if winner in mean and other in mean
    ]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
