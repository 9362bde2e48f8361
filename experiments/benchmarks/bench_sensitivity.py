"""Sensitivity on ResNet-20: the time of every metric, how well each predicts the measured loss, and our Hessian traces
against pyhessian's.

Each line `RESULT name value goal ok|short` is one figure; the tables above give details. `--quick` takes fewer images,
formats and probes.
"""

import argparse
import json
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pyhessian import hessian as PyHessian
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from experiments.models.reference_models import (
    cifar10_calibration,
    cifar10_test,
    resnet,
    wikitext_llama,
    wikitext_tokens,
)
from experiments.models.wide_model import build, load
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.network.calibration import Batch, LossFn, cross_entropy, mean_loss, next_token_loss
from mpq.network.layers import find_layers
from mpq.network.offload import offloaded
from mpq.quantized import simulate
from mpq.rounding.store import MethodRounder
from mpq.search.exact import exact
from mpq.sensitivity import DEFAULT_METRIC, METRICS, metric_named
from mpq.sensitivity.hessian import hessian_traces
from mpq.sensitivity.journal import Journal
from mpq.sensitivity.profile import profile
from mpq.sensitivity.task import Task

FORMATS = ("int2-channel", "int2-g32", "int3-channel", "int3-g32", "int4-channel", "int4-g32", "nvfp4", "int8-channel")
QUICK_FORMATS = ("int2-g32", "int3-channel", "int4-channel")
PEERS = {"peer_modelopt": "nvidia-modelopt", "peer_mct": "model-compression-toolkit", "peer_autoround": "auto-round"}
ERROR = 0.1  # relative standard error at which traces are compared
QUICK_OPTIONS = {"hessian": {"max_probes": 4}, "curvature": {"max_probes": 4}, "eigenvalue": {"max_steps": 5}}


def predictions(batches: tuple[Batch, ...], formats: tuple[str, ...], quick: bool) -> list[str]:
    """Profile with every metric: seconds of those that do not measure, and rank correlations with the oracle."""
    tables: dict[str, SensitivityTable] = {}
    seconds: dict[str, float] = {}
    for metric in METRICS:
        start = time.perf_counter()
        tables[metric] = profile(
            resnet(20),
            batches,
            cross_entropy,
            formats,
            metric=metric,
            options=QUICK_OPTIONS.get(metric) if quick else None,
            progress=False,
        )
        seconds[metric] = time.perf_counter() - start
    oracle = tables["loss"]
    clear = oracle.scores > 2 * oracle.errors
    print(f"\nResNet-20, {oracle.provenance['nsamples']} images, {len(formats)} formats; the oracle's loss is above")
    print(f"twice its standard error in {clear.sum()} of {clear.size} cells; Spearman correlations with it:")
    print(f"{'metric':12}{'seconds':>8}{'all':>7}{'clear':>7}   predicted/measured   {'  '.join(formats)}")
    results = []
    for metric, table in tables.items():
        overall = spearmanr(table.scores.ravel(), oracle.scores.ravel()).statistic
        clearly = spearmanr(table.scores[clear], oracle.scores[clear]).statistic
        ratio = float(np.median(table.scores[clear] / oracle.scores[clear]))
        by_format = [spearmanr(table.scores[:, j], oracle.scores[:, j]).statistic for j in range(len(formats))]
        columns = "".join(f"{value:>{len(name) + 2}.2f}" for name, value in zip(formats, by_format, strict=True))
        print(f"{metric:12}{seconds[metric]:>8.1f}{overall:>7.3f}{clearly:>7.3f}   {ratio:>18.2f} {columns}")
        if metric not in METRICS.names(measured=True):
            results.append(result(f"resnet20_rank_correlation_{metric}", overall, ">0.8", overall > 0.8))
    total = sum(taken for metric, taken in seconds.items() if metric not in METRICS.names(measured=True))
    return [result("resnet20_profile_all_metrics_but_measured_s", total, "<60", total < 60), *results]


def traces(batch: Batch, probes: int) -> list[str]:
    """Seconds until every layer's trace has a standard error of 10 % over probes: ours, and pyhessian's layer by layer.

    Both see the same batch. Ours runs until the target error. pyhessian draws `probes` per layer, and its time is
    scaled to the number of draws that their variance requires.
    """
    model = resnet(20)
    layers = find_layers(model)
    task = Task(model, (batch,), cross_entropy, layers, (parse_scheme("int4-channel"),), MethodRounder("mse"))
    start = time.perf_counter()
    ours = hessian_traces(task, min_probes=4, max_probes=256, target=ERROR, settle=0)
    our_time = time.perf_counter() - start
    reached = float((ours.probe_errors / ours.means).max())
    print(f"\nHessian traces, {len(batch[1])} images: ours, pyhessian's (a run of {probes} draws for each layer)")
    needed, seconds, relative = [], [], []
    for i, layer in enumerate(layers):
        draws, taken = pyhessian_draws(replace_model(task), layer.name, batch, probes)
        mean, error = float(draws.mean()), float(draws.std(ddof=1) / np.sqrt(len(draws)))
        needed.append(max(1.0, len(draws) * (error / (ERROR * ours.means[i])) ** 2))
        seconds.append(taken / len(draws))
        relative.append(draws / ours.means[i] - 1)
        print(f"{layer.name:20} {ours.means[i]:9.3f} +- {ours.probe_errors[i]:7.3f}   {mean:9.3f} +- {error:7.3f}")
    their_time = float(np.dot(needed, seconds))
    print(f"10 % on every layer: ours {our_time:.1f} s, {ours.probes} draws, all within {reached:.1%};")
    print(f"pyhessian {their_time:.1f} s, {np.mean(needed):.0f} draws a layer of {np.mean(seconds):.2f} s each")
    # Few draws underestimate the variance: take the larger of a layer's own standard deviation and the pooled one. The
    # mean over layers is the stricter test.
    deviations = np.array(relative)
    pooled = np.sqrt(np.mean(np.square(deviations)))
    spread = np.maximum(deviations.std(1, ddof=1), pooled) / np.sqrt(probes)
    means = deviations.mean(1)
    worst = float((np.abs(means) / np.hypot(spread, ours.probe_errors / ours.means)).max())
    # Our draws share signs between layers: their errors may be correlated and need not average out.
    shared = float((ours.probe_errors / ours.means).mean())
    bias, error = float(means.mean()), float(np.hypot(means.std(ddof=1) / np.sqrt(len(means)), shared))
    print(f"pyhessian's traces over ours, mean of the layers: {1 + bias:.3f} +- {error:.3f}")
    speed = their_time / our_time
    return [
        result(
            "traces_mean_difference_from_pyhessian_in_standard_errors", abs(bias) / error, "<3", abs(bias) < 3 * error
        ),
        result("traces_largest_difference_from_pyhessian_in_standard_errors", worst, "<4", worst < 4),
        result("traces_largest_relative_standard_error", reached, f"<{ERROR}", reached <= ERROR),
        result("traces_speedup_over_pyhessian_at_equal_error", speed, ">10", speed > 10),
    ]


def replace_model(task: Task) -> Task:
    """The task with a fresh copy of the network, since pyhessian leaves gradients behind."""
    return replace(task, model=resnet(20), journal=Journal(None, {}))


def pyhessian_draws(task: Task, name: str, batch: Batch, probes: int) -> tuple[NDArray[np.float64], float]:
    """pyhessian's draws of one layer's trace, and their seconds."""
    for parameter_name, parameter in task.model.named_parameters():
        parameter.requires_grad_(parameter_name == f"{name}.weight")
    torch.manual_seed(0)  # pyhessian draws from the global generator
    start = time.perf_counter()
    draws = PyHessian(task.model, functional.cross_entropy, data=batch, cuda=False).trace(maxIter=probes, tol=0)
    return np.array(draws), time.perf_counter() - start


@dataclass(frozen=True)
class Subject:
    """A model with calibration and measurement data."""

    model: nn.Module
    calibration: tuple[Batch, ...]
    test: tuple[Batch, ...]
    loss_fn: LossFn
    exclude: tuple[str, ...] = ()


def subject(peer: str) -> tuple[Subject, int]:
    """ResNet-20 and 128 images, or, for a peer of language models only, the Llama and 16 windows of 256 tokens."""
    if peer != "peer_autoround":
        return Subject(resnet(20), cifar10_calibration(128, 32), cifar10_test(), cross_entropy), 128
    tokens, test = wikitext_tokens("train", 16), wikitext_tokens("test", 32)
    ends = ("lm_head", "*embed_tokens")  # not quantized by the peer
    return Subject(wikitext_llama(), tokens.split(2), test.split(8), next_token_loss, ends), 16


def against(script: str, python: str) -> list[str]:
    """Our default metric against a peer's search: seconds, and measured loss of the choices at equal size.

    Both choose integers of 2, 3, 4 or 8 bits with scales by output channel, from the same calibration data, on one
    thread. Both choices are rounded alike and measured on held-out data.
    """
    peer_name = script.removeprefix("peer_")
    torch.set_num_threads(1)
    schemes = [f"int{bits}-channel" for bits in (2, 3, 4, 8)]
    on, samples = subject(script)
    lines: list[str] = []
    start = time.perf_counter()
    table = profile(on.model, on.calibration, on.loss_fn, schemes, method="nearest", exclude=on.exclude, progress=False)
    ours = time.perf_counter() - start
    frontier = exact(build_problem(table))
    reference = mean_loss(on.model, on.test, on.loss_fn)
    for bits in (3.0, 4.0):
        command = [python, "-m", f"experiments.peers.{script}", str(bits), str(samples)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if run.returncode:
            print(f"{peer_name} does not run: {run.stderr.strip().splitlines()[-1]}")
            return lines
        theirs = json.loads(run.stdout.strip().splitlines()[-1])
        names = tuple(f"int{theirs['bits'][layer.name]}-channel" for layer in table.layers)
        peer = Allocation(table.layers, names)
        own = frontier.at(bits=peer.bits)
        losses = [
            mean_loss(simulate(on.model, choice, "nearest", trainable=False), on.test, on.loss_fn) - reference
            for choice in (own, peer)
        ]
        print(f"{peer_name} at {peer.bits:.3f} bits: {theirs['seconds']:.1f} s, loss increase {losses[1]:.4f};")
        print(f"ours at {own.bits:.3f} bits: {ours:.1f} s, loss increase {losses[0]:.4f}")
        speed, gain = theirs["seconds"] / ours, losses[1] - losses[0]
        lines += [
            result(f"{peer_name}_{bits:g}_bits_seconds_over_ours", speed, ">1", speed > 1),
            result(f"{peer_name}_{bits:g}_bits_loss_above_ours", gain, ">=0", gain >= 0),
        ]
    return lines


def offload() -> list[str]:
    """Largest share of the model's weights that is on the device at once with offloading, and the seconds.

    The device is the CPU itself: weights of a network of 13 layers are copied to it module by module and dropped again.
    """
    model, batches = build(), tuple(load())
    layers, schemes = find_layers(model), (parse_scheme("int4-channel"),)
    seconds, scores, peak = [], [], 0
    for context in (nullcontext(), offloaded(model, "cpu")):
        task = Task(model, batches, cross_entropy, layers, schemes, MethodRounder("nearest"))
        start = time.perf_counter()
        with context as visitors:
            scores.append(metric_named(DEFAULT_METRIC)(task)[0])
        seconds.append(time.perf_counter() - start)
        peak = 0 if visitors is None else visitors.peak
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest = max(4 * layer.params for layer in layers)
    same = float(np.abs(scores[1] / scores[0] - 1).max())
    print(f"\noffload: at most {peak / 1e6:.1f} MB of {whole / 1e6:.1f} MB of weights on the device at once,")
    print(f"the largest layer has {largest / 1e6:.1f} MB; {seconds[1]:.1f} s, without {seconds[0]:.1f} s;")
    print(f"scores differ by {same:.1e} at most")
    return [result("offload_peak_weights_over_model", peak / whole, "<0.25", peak < 0.25 * whole)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images, formats and probes")
    for name, package in PEERS.items():
        parser.add_argument(
            f"--{name.removeprefix('peer_')}", dest=name, metavar="PYTHON",
            help=f"of an environment with {package}: compare with peers alone",
        )  # fmt: skip
    parser.add_argument("--only", choices=("predictions", "traces", "offload"), help="one part")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = {name: python for name in PEERS if (python := getattr(options, name))}
    results: list[str] = []
    for name, python in asked.items():
        results += against(name, python)
    parts = () if asked else (options.only,) if options.only else ("predictions", "traces", "offload")
    if "predictions" in parts:
        batches = cifar10_calibration(32, 16) if options.quick else cifar10_calibration(512, 32)
        results += predictions(batches, QUICK_FORMATS if options.quick else FORMATS, options.quick)
    if "traces" in parts:
        (batch,) = cifar10_calibration(32 if options.quick else 64, 64)
        results += traces(batch, 4 if options.quick else 16)
    if "offload" in parts and not options.quick:
        results += offload()
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
