"""Costs of the main job itself: exact frontier of 500 layers, budget query, import time, memory of a run.

    python -m experiments.benchmarks.bench_main_job [--quick]

Losses of the 500 LLaMA-shaped layers are random: a factor of four per bit, sensitivities over several decades. Times
are the best of five. Memory is the peak of a whole `mpq quantize` process above the same process with only the model
and its data loaded, as a share of the model's bytes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.models import wide_model
from experiments.result import result
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.search.exact import exact

FORMATS = (
    "int2-g64", "int2-g128", "int3-g64", "int3-g128", "int4-g32", "int4-g128", "int5-g128", "int6-g128", "int8-g128",
    "fp8-e4m3-channel",
)  # fmt: skip
SHAPES = {
    "q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008),
}  # fmt: skip

# Peak resident memory in kB of a process with model and imports alone, and of one that runs the whole job.
PEAK = "import resource, sys; {}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
LOAD = "from experiments.models.wide_model import build, load"
BASE = f"import mpq.pipeline; {LOAD}; model = build(); model(load()[0][0])"
WHOLE = "from mpq.cli.main import main; assert main(sys.argv[1:]) == 0"


def llama_table(layers: int, seed: int = 0) -> SensitivityTable:
    random = np.random.default_rng(seed)
    names = list(SHAPES)
    ties = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    found = []
    for i in range(layers):
        block, name = f"layers.{i // 7}", names[i % 7]
        tie = f"{block}.{ties[name]}" if name in ties else ""
        found.append(Layer(f"{block}.{name}", "linear", *SHAPES[name], macs=1, tie=tie))
    errors = np.array([4.0 ** -parse_scheme(name).weight.effective_bits() for name in FORMATS])
    scores = random.lognormal(0, 1.5, (layers, 1)) * errors * random.lognormal(0, 0.1, (layers, len(FORMATS)))
    return SensitivityTable(tuple(found), FORMATS, scores, np.zeros_like(scores), "drawn")


def quantize_memory() -> float:
    """Peak memory of `mpq quantize` above that of model and imports, as a multiple of the model's bytes."""

    def peak(code: str, *arguments: str) -> float:
        command = [sys.executable, "-c", PEAK.format(code), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        return float(done.stdout.split()[-1]) * 1024

    size = sum(4 * parameter.numel() for parameter in wide_model.build().parameters())
    with tempfile.TemporaryDirectory() as folder:
        module = "experiments.models.wide_model"
        job = ["quantize", f"{module}:build", "--dataset", f"{module}:load", "--bits", "4.25"]
        whole = peak(WHOLE, *job, "--formats", "int2-g64,int4-g64,int8-channel", "--output", f"{folder}/out")
    return (whole - peak(BASE) + size) / size


def best_of(repeats: int, job: Callable[[], object]) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def import_seconds(module: str) -> float:
    return best_of(3, lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers and repeats")
    quick = parser.parse_args().quick
    results = []
    for layers, tied in ((100, True), (100, False)) if quick else ((100, True), (500, True), (500, False)):
        problem, kind = build_problem(llama_table(layers), ties=tied), "tied" if tied else "free"
        seconds = best_of(1 if quick else 5, lambda problem=problem: exact(problem))
        frontier = exact(problem)
        budgets = np.linspace(2.5, 7.5, 200)
        start = time.perf_counter()
        for bits in budgets:
            frontier.at(bits=bits)
        query = (time.perf_counter() - start) / len(budgets)
        print(
            f"{layers} layers x {len(FORMATS)} formats: {len(frontier):,} points, gap {frontier.gap:g}, {seconds:.2f} s"
        )
        results.append(result(f"exact_frontier_{layers}_{kind}_layers_s", seconds, "<2", seconds < 2))
        results.append(result(f"budget_query_{layers}_{kind}_layers_ms", 1e3 * query, "<1", query < 1e-3))
        results.append(result(f"exact_frontier_{layers}_{kind}_layers_gap", frontier.gap, "=0", frontier.gap == 0))
    ours, torch_alone = import_seconds("mpq"), import_seconds("torch")
    face = import_seconds("mpq.pipeline")
    print(f"import mpq {ours:.2f} s, torch {torch_alone:.2f} s, mpq.pipeline (everything) {face:.2f} s")
    results.append(result("import_mpq_s", ours, "<1.5", ours < 1.5))
    if not quick:
        share = quantize_memory()
        results.append(result("quantize_peak_memory_over_model", share, "<2.5", share < 2.5))
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
