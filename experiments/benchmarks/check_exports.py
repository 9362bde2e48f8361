"""Folders written by `mpq quantize --for TARGET` with defaults, served by the target: quality simulated and served.

    python -m experiments.benchmarks.check_exports [--only TARGET...] [--model MODEL] [--dataset FILE]
                                                   [--table TABLE] [--method METHOD] [--nsamples N]
                                                   [--environments FOLDER] [--minutes N] [--bits BITS]

MODEL is the WikiText Llama (default), tiny-lm as transformers' Llama, the folder of another language model, or qwen3,
gemma3_text, ... with random weights. Each consumer runs in its own environment in FOLDER, built if missing
(`environments.py`), or is skipped with a message; ONNX Runtime and transformers run in this environment. Effort fast,
no tuned scales. The reference is the model simulated in the written allocation, rounded anew; the file's size is
compared with the prediction. TABLE replaces the profile; it must hold schemes of every selected target. Exit status 1
if a figure misses its goal.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import compress
from pathlib import Path

import torch

from experiments.models import reference_models
from experiments.models.tiny_llama import tiny_llama
from experiments.peers.environments import CACHE, Unavailable, python_of
from experiments.peers.served import compared, served
from experiments.result import result
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.exporters.targets import TARGETS
from mpq.exporting import ranges_for, sizer_for
from mpq.measuring import store_for
from mpq.network.calibration import next_token_loss, seeded, tensors_in
from mpq.pipeline import quantize_model
from mpq.quantized import simulate
from mpq.rounding import DEFAULT_METHOD
from mpq.sources import Source, open_source

WINDOWS, LENGTH = 8, 256


@dataclass(frozen=True)
class Job:
    """A target's default of `mpq quantize`, and the consumer that serves it."""

    consumer: str  # name in consumer.py and environments.py
    dtype: str = "bfloat16"
    bits: float = 4.5
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] | None = None  # where the target's own are not computed on this device
    file: str = "model.safetensors"


EMBEDDINGS = ("*embed_tokens",)  # layers that this consumer cannot quantize
JOBS = {
    "mpq": Job("transformers", "float32", 4.25),
    "mpq in vLLM": Job("vllm", "float32", 4.25),
    "vllm:cpu": Job("vllm", exclude=EMBEDDINGS),
    "transformers": Job("transformers", exclude=EMBEDDINGS),
    "gptq": Job("vllm", exclude=EMBEDDINGS, formats=("int4-g32", "int4-g64", "int4-g128", "int4-channel")),
    "modelopt": Job("vllm", bits=8.5, exclude=EMBEDDINGS, formats=("fp8-e4m3-channel+a:fp8-e4m3-token", "bf16")),
    "llama.cpp": Job("llama.cpp", file="model.gguf"),
    "mlx": Job("mlx"),
    "onnxruntime": Job("onnxruntime", file="model.onnx"),
    "openvino": Job("openvino", file="model.onnx"),
}


@dataclass(frozen=True)
class Profiled:
    """Model, data and table that every target's folder is made from."""

    source: Source
    table: SensitivityTable | None = None
    method: str = DEFAULT_METHOD


def source_of(name: str | None, dataset: str | None, nsamples: int) -> Source:
    """The model with `nsamples` calibration windows and `WINDOWS` others to serve."""
    if name == "tiny-lm":
        source = open_source(name, nsamples=nsamples, evaluation_samples=WINDOWS)
        return replace(source, model=tiny_llama(source.model), recipe={}, tokenizer=None)
    if name is None:
        name = str(reference_models.data_file("wikitext2_llama_5m"))
    if Path(name).exists():
        return open_source(name, dataset, nsamples=nsamples, evaluation_samples=WINDOWS, seqlen=LENGTH)
    from tests.exporters.architectures import model_of

    model = model_of(name)
    tokens = torch.randint(3, model.config.vocab_size, (nsamples + 2 * WINDOWS, 64), generator=seeded(0))  # type: ignore[union-attr]
    parts = tokens.split((nsamples, WINDOWS, WINDOWS))
    calibration, acceptance, evaluation = (tuple((batch,) for batch in part.split(4)) for part in parts)
    return Source(name, model, calibration, evaluation, next_token_loss, "perplexity", acceptance=acceptance)


def serve(target: str, job: Job, python: str, profiled: Profiled, folder: Path) -> list[str]:
    """Quantize, serve and compare; return the RESULT lines."""
    source, consumer = profiled.source, target.partition(" ")[0]
    windows = torch.cat([tensors_in(batch)[0] for batch in source.evaluation])
    table = None if profiled.table is None else _only(profiled.table, job)
    outcome = quantize_model(
        source, folder, bits=job.bits, target=consumer, table=table, formats=job.formats, progress=False,
        exclude=job.exclude if _has(source, "embed_tokens") else (), effort="fast", tuning_steps=0,
        method=profiled.method,
    )  # fmt: skip
    allocation = outcome.allocation
    store = store_for(profiled.method, source, allocation.layers)
    model = simulate(source.model, allocation, store, trainable=False, ranges=ranges_for(source, allocation))
    promised, written = sizer_for(TARGETS[consumer], source)(allocation), (folder / job.file).stat().st_size
    print(f"{target}: {allocation.bits:.3f} bits in {outcome.seconds:.0f} s, {written:,} bytes", flush=True)
    name = f"{target}_{Path(source.name).name}"
    try:
        theirs = served(python, job.consumer, folder, windows, job.dtype)
    except RuntimeError as error:
        print(error)
        return [result(f"{name}_served", 0, ">=1", False)]
    agreement = 0.9999 if job.dtype == "float32" else 0.97
    lines = compared(name, model.float(), windows, theirs, agreement=agreement)
    return [*lines, result(f"{name}_size_gap", abs(written - promised), "<=0", written == promised)]


def _only(table: SensitivityTable, job: Job) -> SensitivityTable:
    """The table restricted to a job's formats and float copies, without the layers that the job excludes."""
    columns = [name in (*(job.formats or table.schemes), "bf16") for name in table.schemes]
    rows = [not any(fnmatch(layer.name, pattern) for pattern in job.exclude) for layer in table.layers]
    return replace(
        table, schemes=tuple(compress(table.schemes, columns)), layers=tuple(compress(table.layers, rows)),
        scores=table.scores[rows][:, columns], errors=table.errors[rows][:, columns],
    )  # fmt: skip


def _has(source: Source, ending: str) -> bool:
    return any(name.endswith(ending) for name, _ in source.model.named_modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(JOBS), default=tuple(JOBS), metavar="TARGET")
    parser.add_argument("--model", help="tiny-lm, a folder of a language model, or an architecture with random weights")
    parser.add_argument("--dataset", help="text to calibrate on, where the model is a folder")
    parser.add_argument("--table", help="a table of the model that was made before, instead of profiling")
    parser.add_argument("--method", default=DEFAULT_METHOD, help=f"rounding method (default: {DEFAULT_METHOD})")
    parser.add_argument("--bits", type=float, help="of weights (default: the target's own)")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--environments", type=Path, default=CACHE, metavar="FOLDER", help=f"default: {CACHE}")
    parser.add_argument("--minutes", type=float, help="that building an environment may take")
    options = parser.parse_args()
    with reference_models.skipping():
        source = source_of(options.model, options.dataset, options.nsamples)
    table = None if options.table is None else SensitivityTable.load(options.table)
    profiled = Profiled(source, table, options.method)
    lines: list[str] = []
    for target in options.only:
        job = JOBS[target] if options.bits is None else replace(JOBS[target], bits=options.bits)
        try:
            python = python_of(job.consumer, options.environments, options.minutes)
        except Unavailable as error:
            print(f"{target}: SKIPPED, {error}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as name:
            try:
                lines += serve(target, job, python, profiled, Path(name) / "out")
            except MpqError as error:
                print(f"{target}: {error}")
                lines.append(result(f"{target}_written", 0, ">=1", False))
    print("\n".join(lines))
    sys.exit(any(" short" in line for line in lines))


if __name__ == "__main__":
    main()
