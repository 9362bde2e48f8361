"""The models of the proxy experiments: their benchmarks (experiments/results) and statistics (out/, collected once)."""

from collections.abc import Iterable
from pathlib import Path

from experiments.models import reference_models
from experiments.papers.build_benchmarks import RESULTS, load
from mpq.network.calibration import Batch
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.collect import SAMPLES, collect_statistics
from mpq.proxies.statistics import Statistics

OUT = Path(__file__).resolve().parents[2] / "out"
NAMES = ("resnet20", "resnet56", "llama5m")


def benchmark_of(name: str) -> Benchmark:
    """The measured configurations; MpqError if the weights in the data folder are not those measured."""
    benchmark = Benchmark.load(RESULTS / f"benchmark_{name}.csv")
    benchmark.check_model(load(name)[0])
    return benchmark


EVERY = (*NAMES, "efficientnet_lite0")


def calibration_of(name: str) -> tuple[Batch, ...]:
    """Training data that statistics are collected on, disjoint from the benchmark's."""
    if name == "llama5m":
        return tuple(reference_models.wikitext_tokens("train", 8).split(8))
    if name == "efficientnet_lite0":
        return reference_models.imagenet_sample(500, 16, 8)
    return reference_models.cifar10_calibration({"resnet20": 256, "resnet56": 128}[name], 64)


def statistics_of(name: str, wanted: Iterable[str], tag: str = "", samples: int = SAMPLES) -> Statistics:
    """The statistics of a model, cached in out/."""
    model, _, loss_fn, _, _ = load(name)
    schemes = Benchmark.load(RESULTS / f"benchmark_{name}.csv").schemes
    return collect_statistics(
        model, calibration_of(name), loss_fn, schemes, wanted=wanted, progress=True, samples=samples,
        cache=OUT / f"statistics_{name}{tag}.npz",
    )  # fmt: skip
