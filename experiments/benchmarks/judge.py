"""Rank metrics by how well they predict the measured loss of random allocations: ResNets and a language model.

    python -m experiments.benchmarks.judge [--quick] [--models resnet20 llama] [--metrics ...] [--count 20]
        [--figures DIR]

Tables come from calibration data, measured losses from held-out data. For every metric: Spearman and Kendall with
bootstrap intervals, Spearman at fixed size, and regret: excess loss of its own allocation over the best known of that
size. RESULT lines come last.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from experiments.models.reference_models import (
    cifar10_calibration,
    cifar10_test,
    resnet,
    wikitext_llama,
    wikitext_tokens,
)
from experiments.result import result
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.judge import judge, plot_judgement
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss
from mpq.search.exact import exact
from mpq.sensitivity.profile import profile

FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int8-channel")
CONTESTANTS: dict[str, tuple[str, dict[str, object]]] = {
    "hessian": ("hessian", {"max_probes": 4}),
    "hessian-gn": ("hessian", {"operator": "gauss-newton", "max_probes": 4}),
    "eigenvalue": ("eigenvalue", {"samples": 64, "max_steps": 8}),
    "fisher": ("fisher", {}),
    "fisher-model": ("fisher", {"labels": "model"}),
    "output": ("output", {}),
    "output-model": ("output", {"labels": "model"}),
    "gptq": ("gptq", {}),
    "kron": ("kronecker", {}),
    "kron-model": ("kronecker", {"labels": "model"}),
    "gradient": ("gradient", {}),
    "quadratic": ("quadratic", {}),
    "curvature": ("curvature", {"max_probes": 4}),
    "linearity": ("linearity", {}),
    "loss": ("loss", {}),
    "divergence": ("divergence", {}),
}
QUICK = ("fisher", "output", "output-model", "quadratic")


def subject(
    name: str, samples: int
) -> tuple[nn.Module, tuple[Batch, ...], tuple[Batch, ...], LossFn, tuple[float, ...]]:
    """Model, calibration data, held-out data, loss, budgets in bits."""
    if name == "llama":
        calibration = tuple(wikitext_tokens("valid", max(4, samples // 16)).split(4))
        held_out = tuple(wikitext_tokens("test", max(4, samples // 16)).split(4))
        return wikitext_llama(), calibration, held_out, next_token_loss, (2.8, 3.2, 4.0)
    depth = int(name.removeprefix("resnet"))
    calibration = cifar10_calibration(samples, 32)
    return resnet(depth), calibration, cifar10_test(max(100, samples))[:1], cross_entropy, (2.9, 3.3, 4.0)


def study(name: str, options: argparse.Namespace) -> list[str]:
    """Profile with every metric, judge, and compare HAWQ's ranking with its reverse at equal size."""
    model, calibration, held_out, loss_fn, budgets = subject(name, options.samples)
    tables: dict[str, SensitivityTable] = {}
    seconds: dict[str, float] = {}
    for contestant in options.metrics:
        metric, settings = CONTESTANTS[contestant]
        start = time.perf_counter()
        tables[contestant] = profile(
            model,
            calibration,
            loss_fn,
            FORMATS,
            metric=metric,
            options=settings,
            method="nearest",
            seed=options.seed,
            progress=False,
        )
        seconds[contestant] = time.perf_counter() - start
    found = judge(
        model,
        held_out,
        loss_fn,
        tables,
        budgets=budgets,
        count=options.count,
        method="nearest",
        seed=options.seed,
        progress=False,
    )
    print(f"\n{name}: {len(found.measured)} random allocations at {budgets} bits, {len(FORMATS)} formats\n{found}")
    print("seconds of profiling: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()))
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        plot_judgement(found).savefig(options.figures / f"judge_{name}.png", dpi=130)
    lines = [
        result(f"{name}_regret_{verdict.metric}", float(verdict.regrets.sum()), "report", True)
        for verdict in found.verdicts
    ]
    if "hessian" in tables:
        lines.append(reversed_ranking(name, tables, found.budgets[1], (model, held_out, loss_fn)))
    return lines


def reversed_ranking(name: str, tables: dict[str, SensitivityTable], bits: float, data: tuple) -> str:
    """Measured loss of the Hessian's allocation and of the one for reversed layer ranking, at equal size."""
    table = tables["hessian"]
    order = table.scores[:, 0].argsort()
    factors = table.scores[:, 0] / [layer.params for layer in table.layers]
    swapped = factors.copy()
    swapped[order] = factors[order[::-1]]
    scores = table.scores * (swapped / factors)[:, None]
    reverse = SensitivityTable(table.layers, table.schemes, scores, table.errors * 0, "reversed", table.provenance)
    model, batches, loss_fn = data
    found = judge(
        model,
        batches,
        loss_fn,
        {"forward": table, "reversed": reverse},
        budgets=(bits,),
        count=3,
        method="nearest",
        progress=False,
    )
    forward, backward = float(found.chosen["forward"][0]), float(found.chosen["reversed"][0])
    sizes = [exact(build_problem(each)).at(bits=bits).bits for each in (table, reverse)]
    print(
        f"HAWQ-V2's allocation at {sizes[0]:.3f} bits loses {forward:.4f}, the reversed one at {sizes[1]:.3f} "
        f"{backward:.4f}"
    )
    return result(f"{name}_reversed_over_forward_loss", backward / max(forward, 1e-9), ">1.5", backward > 1.5 * forward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer metrics, samples and allocations")
    parser.add_argument("--models", nargs="+", default=["resnet20", "llama"], help="resnet20, resnet56, llama")
    parser.add_argument("--metrics", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images; a sixteenth as many windows")
    parser.add_argument("--count", type=int, default=20, help="random allocations at each budget")
    parser.add_argument("--seed", type=int, default=0, help="of probes, slopes and allocations")
    parser.add_argument("--figures", type=Path, help="folder for figures")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.models, options.metrics, options.samples, options.count = ["resnet20"], list(QUICK), 64, 8
    results = [line for name in options.models for line in study(name, options)]
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
