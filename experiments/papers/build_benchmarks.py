"""Measure the ranking benchmarks of four models: experiments/results/benchmark_*.csv.

    nice python -m experiments.papers.build_benchmarks [resnet20] [resnet56] [llama5m] [efficientnet_lite0]

Weights are rounded per output channel to 2, 3 or 4 bits (EfficientNet-Lite0, which collapses at 4 bits: 4, 5 or 6) with
scales of least squared error; the first and last layer take 8 bits, as in EMQ (arXiv 2307.10554). Activations stay in
floating point: EMQ's 8 bits would double the time per row; `--check-activations` measures their effect. An interrupted
run keeps finished rows and resumes.
"""

import argparse
import copy

import numpy as np
import torch
from scipy.stats import spearmanr

from experiments.models import reference_models
from experiments.result import result
from mpq.core.formats import parse_format
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.measuring import build_benchmark, measure
from mpq.rounding import method_named
from mpq.rounding.activations import fake_quantize_inputs
from mpq.rounding.reference import dequantize

RESULTS = reference_models.Path(__file__).resolve().parents[1] / "results"
SCHEMES = ("int2-channel", "int3-channel", "int4-channel")
WIDER = {"efficientnet_lite0": ("int4-channel", "int5-channel", "int6-channel")}
ROWS = {"resnet20": 425, "resnet56": 150, "llama5m": 150, "efficientnet_lite0": 100}
IMAGES = {"resnet20": 1000, "resnet56": 500, "efficientnet_lite0": 96}


def load(name: str) -> tuple[torch.nn.Module, tuple[Batch, ...], LossFn, dict[str, str], str]:
    """Model, measurement data, loss, fixed layers, and a description of the data."""
    if name == "llama5m":
        windows = reference_models.wikitext_tokens("valid", 16)
        fixed = {"*embed_tokens": "int8-channel", "lm_head": "int8-channel"}
        return reference_models.wikitext_llama(), windows.split(4), next_token_loss, fixed, "wikitext2 valid, 16 x 256"
    images = IMAGES[name]
    if name == "efficientnet_lite0":
        sample = reference_models.imagenet_sample(0, images, 32)
        fixed = {"conv_stem": "int8-channel", "fc": "int8-channel"}
        return reference_models.efficientnet_lite0(), sample, cross_entropy, fixed, f"imagenet sample, {images} images"
    batches = reference_models.cifar10_test(batch_size=50)[: images // 50]
    fixed = {"conv1": "int8-channel", "linear": "int8-channel"}
    return reference_models.resnet(int(name[6:])), batches, cross_entropy, fixed, f"cifar10 test, {images} images"


def build(name: str, rows: int, seed: int) -> Benchmark:
    model, batches, loss_fn, fixed, data = load(name)
    return build_benchmark(
        model, batches, loss_fn, WIDER.get(name, SCHEMES), rows, fixed=fixed, seed=seed,
        resume=RESULTS / f".benchmark_{name}.part",
        provenance={"model": name, "dataset": data, "activations": "fp32"},
    )  # fmt: skip


def check_activations(name: str, rows: int = 40) -> float:
    """Spearman correlation of losses with floating-point and with 8-bit activations, over the first rows."""
    benchmark = Benchmark.load(RESULTS / f"benchmark_{name}.csv").take(range(rows))
    model, batches, loss_fn, _, _ = load(name)
    network, rounding, eight = copy.deepcopy(model), method_named(benchmark.provenance["method"]), parse_format("int8")
    for layer in find_layers(network):
        if layer.kind != "embedding":
            network.get_submodule(layer.name).register_forward_pre_hook(
                lambda module, args: (fake_quantize_inputs(module, args[0], eight), *args[1:])
            )
    losses = []
    for choice in benchmark.choices:
        for layer, index in zip(benchmark.layers, choice, strict=True):
            original, module = model.get_submodule(layer.name), network.get_submodule(layer.name)
            rounded = dequantize(rounding(weight_matrix(original), parse_format(benchmark.schemes[index]), None))
            with torch.no_grad():
                module.weight.copy_(matrix_to_weight(rounded, module))
        losses.append(measure(network, batches, loss_fn)[0])
    return float(spearmanr(losses, benchmark.losses).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rows", type=int, default=None, help="rows of each (default: 425, 150, 150, 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check-activations", action="store_true", help="what 8-bit activations change, on 40 rows")
    options = parser.parse_args()
    if not reference_models.DATA.exists():
        print("build_benchmarks: ../shared/data is absent, nothing to measure")
        return
    torch.set_num_threads(options.threads)
    for name in options.names:
        if options.check_activations:
            value = check_activations(name)
            print(result(f"{name}_rank_with_8bit_activations", value, ">0.95", value > 0.95))
            continue
        benchmark = build(name, options.rows or ROWS[name], options.seed)
        benchmark.save(RESULTS / f"benchmark_{name}.csv")
        print(f"{name}: {len(benchmark)} rows, quality {np.quantile(benchmark.quality, [0, 0.5, 1]).round(4)}")


if __name__ == "__main__":
    main()
