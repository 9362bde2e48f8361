"""FP4 training of small models: the cost of scale type, rounding, rotation, relaxation and convention.

After "Elucidating the design space of FP4 training" (arXiv 2509.17791), on four kinds of task, with paired seeds and
held-out data instead of the least training loss. Every layer but the last (and an image model's first) runs its three
products in the format, simulated. The overhead is the share of operations that a recipe adds; a technique's gain is
divided by the percentage it adds to the plain format. `--quick` trains a few recipes of two tasks for a few steps.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from experiments.models.training_tasks import TASKS
from experiments.result import result
from mpq.core.patterns import match_names
from mpq.lowprecision import Recipe, StableSPAM
from mpq.lowprecision.study import Run, Setting, Task, added_share, compare, gaps, mean_with_error

BASE = "full precision"
E4M3, UE5M3 = "fp4-e2m1-g16-se4m3", "fp4-e2m1-g16-sue5m3"
BOTH = {"stochastic": "backward", "hadamard": "backward"}
RECIPES: dict[str, Recipe] = {
    "fp8 hybrid": Recipe("fp8-e4m3", gradients="fp8-e5m2"),
    "mxfp4": Recipe("mxfp4"),
    "mxfp4, SR backward": Recipe("mxfp4", stochastic="backward"),
    "mxfp4, SR and RHT backward": Recipe("mxfp4", **BOTH),
    "mxfp4, scales up": Recipe("mxfp4", scale_rounding="up"),
    "nvfp4": Recipe("nvfp4"),
    "nvfp4, SR forward": Recipe("nvfp4", stochastic="forward"),
    "nvfp4, SR backward": Recipe("nvfp4", stochastic="backward"),
    "nvfp4, RHT backward": Recipe("nvfp4", hadamard="backward"),
    "nvfp4, SR and RHT backward": Recipe("nvfp4", **BOTH),
    "nvfp4, SR, RHT, square weights": Recipe("nvfp4", **BOTH, square_weights=True),
    "nvfp4, scales up": Recipe("nvfp4", scale_rounding="up"),
    "nvfp4, power (k = 5)": Recipe("nvfp4", relaxation="power"),
    "nvfp4, spline": Recipe("nvfp4", relaxation="spline"),
    "nvfp4, sigmoid": Recipe("nvfp4", relaxation="sigmoid"),
    "nvfp4, scale gradient absmax": Recipe("nvfp4", scale_gradient="absmax"),
    "nvfp4, scale gradient softmax": Recipe("nvfp4", scale_gradient="softmax"),
    "nvfp4, reciprocal": Recipe("nvfp4", convention="reciprocal"),
    "e4m3": Recipe(E4M3),
    "e4m3, loss scale 2^14": Recipe(E4M3, loss_scale=2.0**14),
    "e4m3, dynamic loss scale": Recipe(E4M3, loss_scale="dynamic"),
    "e4m3, reciprocal": Recipe(E4M3, convention="reciprocal"),
    "ue5m3": Recipe(UE5M3),
    "ue5m3, tensor scale": Recipe(f"{UE5M3}-ts"),
    "ue5m3, tensor scale, SR and RHT": Recipe(f"{UE5M3}-ts", **BOTH),
}
SETTINGS: dict[str, Setting] = {
    BASE: Setting(),
    f"{BASE}, Stable-SPAM": Setting(None, StableSPAM),
    **{name: Setting(recipe) for name, recipe in RECIPES.items()},
    "nvfp4, SR, RHT, Stable-SPAM": Setting(Recipe("nvfp4", **BOTH), StableSPAM),
}
QUICK = (BASE, "nvfp4", "nvfp4, SR backward", "nvfp4, spline", "e4m3")
MOST = 9.99  # largest mean gap that is printed; beyond it the run has diverged


def table(task: Task, runs: Sequence[Run]) -> dict[str, float]:
    """Print the task's table; return the mean gap of each setting."""
    above = {name: values for (name, _), values in gaps(runs, BASE).items()}
    added = {name: added_share(task, SETTINGS[name]) for name in above}
    base = np.array([run.loss for run in runs if run.setting == BASE])
    print(f"\n### {task.name}: unseen loss {base.mean():.4f} in full precision\n")
    print("| setting | gap | added operations | gain for each added percent |")
    print("|---|---|---|---|")
    for name, values in above.items():
        mean, error = mean_with_error(values)
        plain = name.split(",")[0]
        more = 100 * (added[name] - added.get(plain, 0.0))
        gain = f"{(above[plain].mean() - mean) / more:+.4f}" if plain in above and more > 1e-9 else ""
        gap = f"{mean:+.4f} +- {error:.4f}" if mean < MOST else "diverged"
        print(f"| {name} | {gap} | {added[name]:.1%} | {gain if plain != name else ''} |", flush=True)
    return {name: float(values.mean()) for name, values in above.items()}


BETTER = {  # expected winner and its rival
    "sr_backward_gain_nvfp4": ("nvfp4, SR backward", "nvfp4"),
    "sr_forward_cost_nvfp4": ("nvfp4", "nvfp4, SR forward"),
    "nvfp4_gain_over_mxfp4": ("nvfp4", "mxfp4"),
    "tensor_scale_gain_e4m3": ("nvfp4", "e4m3"),
    "tensor_scale_gain_ue5m3": ("ue5m3, tensor scale", "ue5m3"),
    "division_gain_nvfp4": ("nvfp4", "nvfp4, reciprocal"),
    "spline_gain_nvfp4": ("nvfp4, spline", "nvfp4"),
    "loss_scale_gain_e4m3": ("e4m3, loss scale 2^14", "e4m3"),
    "fp8_gain_over_nvfp4": ("fp8 hybrid", "nvfp4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five settings of two tasks, one seed, 30 steps")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", default=["*"], help="patterns of the settings to train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = match_names(options.settings, list(SETTINGS), "setting")
    names = QUICK if options.quick else tuple(dict.fromkeys((BASE, *chosen)))
    seeds, steps = (1, 30) if options.quick else (options.seeds, options.steps)
    lines = []
    for task_name in ("regression", "diffusion") if options.quick else options.tasks:
        begin, task = time.perf_counter(), TASKS[task_name]()
        runs = compare(task, {name: SETTINGS[name] for name in names}, seeds=seeds, steps=steps)
        mean = table(task, runs)
        print(f"\n{steps} steps, {seeds} seeds, paired; mean +- standard error; {time.perf_counter() - begin:.0f} s")
        for name, (winner, other) in BETTER.items():
            if winner in mean and other in mean:
                difference = mean[other] - mean[winner]
                lines.append(result(f"fp4_{task_name}_{name}", difference, ">0", difference > 0))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
