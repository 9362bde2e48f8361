"""How few mantissa and exponent bits can a small language model train with, and does sharpness tell in advance?

After "To FP8 and back again" (arXiv 2405.18710): bfloat16 operands of every linear layer's three products but the
output head's, masked to fewer bits, at several learning rates and seeds. A run has failed when its loss on unseen text
is not finite or far above that of the same seed and rate in full precision. `--quick` trains a few runs.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
import torch
from scipy.stats import mannwhitneyu, spearmanr

from experiments.models.small_lm import train, training_windows, unseen_loss, unseen_windows, untrained
from mpq.lowprecision import convert
from mpq.lowprecision.masking import Mask
from mpq.lowprecision.sharpness import logit_sharpness

MANTISSAS = {"E8M7": Mask(), "E8M5": Mask(5), "E8M3": Mask(3), "E8M2": Mask(2), "E8M1": Mask(1)}
OTHERS = {
    "E8M2 nearest": Mask(2, rounding="nearest"), "E8M1 nearest": Mask(1, rounding="nearest"),
    "E7M7": Mask(exponent=7), "E5M7": Mask(exponent=5), "E4M7": Mask(exponent=4),
    "E4M7 outer": Mask(exponent=4, inner=False), "E4M7 inner": Mask(exponent=4, outer=False),
}  # fmt: skip
FAR = 0.3  # nats above full precision
BASE_RATE = 0.01


@dataclass(frozen=True)
class Run:
    """One training."""

    name: str
    rate: float
    seed: int
    loss: float
    sharpness: tuple[tuple[int, float], ...]  # (step, mean sharpness of unseen sequences)


def run(name: str, mask: Mask | None, rate: float, seed: int, steps: int) -> Run:
    seen, unseen = training_windows(), unseen_windows()
    model, series = untrained(seed), []
    if mask is not None:
        convert(model, mask, exclude=("head",), seed=seed)

    def watch(step: int) -> None:
        if step % (steps // 6) == 0:
            series.append((step, logit_sharpness(model, unseen[:32]).mean().item()))

    train(model, seen, steps, seed=seed, rate=rate, watch=watch)
    return Run(name, rate, seed, unseen_loss(model, unseen), tuple(series))


def table(runs: list[Run], names: list[str], rates: tuple[float, ...]) -> dict[tuple[str, float], np.ndarray]:
    """Gaps to full precision by mask and rate; printed."""
    full = {(r.rate, r.seed): r.loss for r in runs if r.name == "full"}
    gaps = {
        (name, rate): np.array([r.loss - full[rate, r.seed] for r in runs if (r.name, r.rate) == (name, rate)])
        for name in names
        for rate in rates
    }
    print("\nLoss of unseen text above full precision (mean), and runs that failed")
    print(f"{'':14}" + "".join(f"{f'rate {rate:g}':>18}" for rate in rates))
    for name in names:
        cells = [gaps[name, rate] for rate in rates]
        print(f"{name:14}" + "".join(f"{c.mean():>+10.3f} {int((~(c < FAR)).sum())}/{len(c)}   " for c in cells))
    return gaps


def warning(runs: list[Run]) -> tuple[float, float, float, float]:
    """Spearman correlation of sharpness halfway with the final loss; AUC for failure and its 95 % interval."""
    full = {(r.rate, r.seed): r.loss for r in runs if r.name == "full"}
    usable = [r for r in runs if r.name != "full" and len(r.sharpness) > 3]
    early = np.array([r.sharpness[3][1] for r in usable])
    gaps = np.array([r.loss - full[r.rate, r.seed] for r in usable])
    failed = ~(gaps < FAR)
    correlation = float(spearmanr(early, np.nan_to_num(gaps, posinf=1e9)).statistic)

    def auc(index: np.ndarray) -> float:
        bad, good = early[index][failed[index]], early[index][~failed[index]]
        return float(mannwhitneyu(bad, good).statistic / (len(bad) * len(good))) if len(bad) and len(good) else np.nan

    draws = np.random.default_rng(0)
    bootstrap = [auc(draws.integers(0, len(usable), len(usable))) for _ in range(500)]
    low, high = np.nanpercentile(bootstrap, [2.5, 97.5]) if not np.isnan(bootstrap).all() else (np.nan, np.nan)
    return correlation, auc(np.arange(len(usable))), float(low), float(high)


def result(name: str, value: float, goal: str, reached: bool) -> str:
    return f"RESULT {name} {value:.4f} {goal} {'ok' if reached else 'short'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three masks, one rate and seed, 42 steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[BASE_RATE, 4 * BASE_RATE])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, seeds = (42, 1) if options.quick else (options.steps, options.seeds)
    rates = (BASE_RATE,) if options.quick else tuple(options.rates)
    masks: dict[str, Mask | None] = {"full": None, **MANTISSAS, **OTHERS}
    if options.quick:
        masks = {name: masks[name] for name in ("full", "E8M7", "E8M1", "E4M7")}
    runs = [run(n, mask, rate, seed, steps) for n, mask in masks.items() for rate in rates for seed in range(seeds)]
    gaps = table(runs, list(masks), rates)
    mean = {name: float(np.mean([gaps[name, rate].mean() for rate in rates])) for name in masks}
    kept = [name for name in MANTISSAS if name in masks]
    worst = max(mean[more] - mean[fewer] for more, fewer in pairwise(kept))
    lines = [
        result("fp8_mantissa_monotone_worst_inversion", worst, "<0.02", worst < 0.02),
        result("fp8_e8m7_gap", mean["E8M7"], "<0.05", abs(mean["E8M7"]) < 0.05),
        result("fp8_e8m1_gap", mean["E8M1"], ">e8m7", mean["E8M1"] > mean["E8M7"]),
    ]
    if not options.quick:
        correlation, auc, low, high = warning(runs)
        print(f"\nsharpness halfway: Spearman with the final gap {correlation:+.2f}; AUC for failure {auc:.2f}", end="")
        print(f" (95 % {low:.2f} to {high:.2f})")
        gain = mean["E8M1"] - mean["E8M1 nearest"]
        lines += [
            result("fp8_nearest_gain_e8m1", gain, ">0", gain > 0),
            result("fp8_sharpness_auc_low_end", low, ">0.5", low > 0.5 and auc < inf),
        ]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
