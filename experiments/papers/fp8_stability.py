"""The fewest mantissa and exponent bits that small models train with, and sharpness as an early warning.

After "To FP8 and back again" (arXiv 2405.18710): bfloat16 operands of the three products of every layer but the last
are masked to fewer bits, at several learning rates and seeds. A run has failed if its loss on held-out data is not
finite or far above that of the same seed and rate in full precision. `--quick` trains a few runs.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.models.training_tasks import TASKS
from experiments.result import result
from mpq.lowprecision import Mask
from mpq.lowprecision.study import Run, Setting, compare, early_warning, gaps

BASE = "full precision"
MANTISSAS = {"E8M7": Mask(), "E8M5": Mask(5), "E8M3": Mask(3), "E8M2": Mask(2), "E8M1": Mask(1)}
OTHERS = {
    "E8M2 nearest": Mask(2, rounding="nearest"), "E8M1 nearest": Mask(1, rounding="nearest"),
    "E7M7": Mask(exponent=7), "E5M7": Mask(exponent=5), "E4M7": Mask(exponent=4),
    "E4M7 outer": Mask(exponent=4, inner=False), "E4M7 inner": Mask(exponent=4, outer=False),
}  # fmt: skip
FAR = {"language": 0.3, "classification": 0.3, "regression": 0.1, "diffusion": 0.1}  # above full precision


def table(task: str, runs: Sequence[Run]) -> dict[tuple[str, float], NDArray[np.float64]]:
    """Print the gaps to full precision by mask and rate."""
    above = gaps(runs, BASE)
    rates = sorted({rate for _, rate in above})
    print(f"\n### {task}: unseen loss above full precision (mean), and runs that failed (by more than {FAR[task]})\n")
    print("| mask |" + "".join(f" rate {rate:g} |" for rate in rates))
    print("|---|" + "---|" * len(rates))
    for name in dict.fromkeys(name for name, _ in above):
        cells = [above[name, rate] for rate in rates]
        print(f"| {name} |" + "".join(f" {c.mean():+.3f}, {int((~(c < FAR[task])).sum())}/{len(c)} |" for c in cells))
    return above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three masks, one rate and seed, 30 steps, small network")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["language"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 4], help="of the task's learning rate")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, seeds, factors = (30, 1, [1.0]) if options.quick else (options.steps, options.seeds, options.factors)
    settings = {BASE: Setting(), **{name: Setting(mask) for name, mask in {**MANTISSAS, **OTHERS}.items()}}
    if options.quick:
        settings = {name: settings[name] for name in (BASE, "E8M7", "E8M1", "E4M7")}
    lines = []
    for name in ["classification"] if options.quick else options.tasks:
        task = TASKS[name]()
        runs = compare(task, settings, seeds=seeds, steps=steps, rates=[task.rate * factor for factor in factors])
        above = table(name, runs)
        mean = {mask: float(np.mean([v.mean() for (m, _), v in above.items() if m == mask])) for mask in settings}
        kept = [mask for mask in MANTISSAS if mask in settings]
        worst = max(mean[more] - mean[fewer] for more, fewer in pairwise(kept))
        lines += [
            result(f"fp8_{name}_mantissa_worst_inversion", worst, "<0.02", worst < 0.02),
            result(f"fp8_{name}_e8m7_gap", mean["E8M7"], "<0.05", abs(mean["E8M7"]) < 0.05),
            result(f"fp8_{name}_e8m1_gap", mean["E8M1"], ">e8m7", mean["E8M1"] > mean["E8M7"]),
        ]
        if options.quick:
            continue
        gain = mean["E8M1"] - mean["E8M1 nearest"]
        lines.append(result(f"fp8_{name}_nearest_gain_e8m1", gain, ">0", gain > 0))
        if task.sharpness is not None:
            warning = early_warning(runs, BASE, FAR[name])
            low, high = warning.interval
            print(
                f"\nsharpness halfway: Spearman with the final gap {warning.correlation:+.2f}; AUC for failure ", end=""
            )
            print(f"{warning.auc:.2f} (95 % {low:.2f} to {high:.2f}), {warning.failed} of {warning.runs} runs failed")
            lines.append(result(f"fp8_{name}_sharpness_auc_low", low, ">0.5", low > 0.5 and warning.auc < inf))
    print(f"\n{steps} steps, {seeds} seeds\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
