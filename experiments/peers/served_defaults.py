"""Folders as `mpq quantize --for TARGET` writes them by default, served by the target: quality simulated and served.

    python -m experiments.peers.served_defaults [--only TARGET...] [--model MODEL] [--nsamples N] [--vllm PYTHON]
                                                [--llama PYTHON] [--mlx PYTHON] [--openvino PYTHON]

MODEL is the WikiText Llama (left out), the folder of another language model, or qwen3, gemma3_text, ... with random
weights. Each consumer stands in an environment of its own, whose Python is named; ONNX Runtime and transformers in this
one. Effort fast, no tuned scales. What was simulated is the model in the allocation that was written, rounded anew; the
file's size is compared with the promise.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.models import reference_models
from experiments.peers.served import compared, served, simulated
from experiments.result import result
from mpq.core.errors import MpqError
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
    """A default of `mpq quantize`, and who serves it."""

    consumer: str  # of consumer.py
    dtype: str = "bfloat16"
    bits: float = 4.5
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] | None = None  # where the target's own are not computed on this device
    file: str = "model.safetensors"


EMBEDDINGS = ("*embed_tokens",)  # which this consumer holds in no format: they stay as they are
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


def source_of(name: str | None, nsamples: int) -> Source:
    """The model with `nsamples` windows to calibrate on and `WINDOWS` others to serve."""
    if name is None:
        name = str(reference_models.data_file("wikitext2_llama_5m"))
    if Path(name).exists():
        return open_source(name, nsamples=nsamples, evaluation_samples=WINDOWS, seqlen=LENGTH)
    from tests.exporters.architectures import model_of

    model = model_of(name)
    tokens = torch.randint(3, model.config.vocab_size, (nsamples + 2 * WINDOWS, 64), generator=seeded(0))  # type: ignore[union-attr]
    parts = tokens.split((nsamples, WINDOWS, WINDOWS))
    calibration, acceptance, evaluation = (tuple((batch,) for batch in part.split(4)) for part in parts)
    return Source(name, model, calibration, evaluation, next_token_loss, "perplexity", acceptance=acceptance)


def serve(target: str, job: Job, python: str, source: Source, folder: Path) -> list[str]:
    """Quantize, serve and compare; the RESULT lines."""
    consumer = target.partition(" ")[0]
    windows = torch.cat([tensors_in(batch)[0] for batch in source.evaluation])
    outcome = quantize_model(
        source, folder, bits=job.bits, target=consumer, exclude=job.exclude if _has(source, "embed_tokens") else (),
        formats=job.formats, progress=False, effort="fast", tuning_steps=0,
    )  # fmt: skip
    allocation = outcome.allocation
    store = store_for(DEFAULT_METHOD, source, allocation.layers)
    model = simulate(source.model, allocation, store, trainable=False, ranges=ranges_for(source, allocation))
    promised, written = sizer_for(TARGETS[consumer], source)(allocation), (folder / job.file).stat().st_size
    print(f"{target}: {allocation.bits:.3f} bits in {outcome.seconds:.0f} s, {written:,} bytes", flush=True)
    name = f"{target}_{Path(source.name).name}"
    try:
        theirs = served(python, job.consumer, folder, windows, job.dtype)
    except RuntimeError as error:
        print(error)
        return [result(f"{name}_served", 0, ">=1", False)]
    exact = job.dtype == "float32"
    lines = compared(name, simulated(model.float(), windows), theirs, agreement=0.9999 if exact else 0.97)
    return [*lines, result(f"{name}_size_gap", abs(written - promised), "<=0", written == promised)]


def _has(source: Source, ending: str) -> bool:
    return any(name.endswith(ending) for name, _ in source.model.named_modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(JOBS), default=tuple(JOBS), metavar="TARGET")
    parser.add_argument("--model", help="folder of a language model, or an architecture with random weights")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows (default: 32)")
    for consumer in ("vllm", "llama", "mlx", "openvino"):
        parser.add_argument(f"--{consumer}", default="", help=f"Python of an environment with {consumer}")
    options = parser.parse_args()
    pythons = {
        "vllm": options.vllm, "llama.cpp": options.llama, "mlx": options.mlx, "openvino": options.openvino,
        "transformers": sys.executable, "onnxruntime": sys.executable,
    }  # fmt: skip
    with reference_models.skipping():
        source = source_of(options.model, options.nsamples)
    lines: list[str] = []
    for target in options.only:
        job = JOBS[target]
        if not pythons[job.consumer]:
            print(f"{target}: skipped, --{job.consumer.replace('.cpp', '')} names no Python")
            continue
        with tempfile.TemporaryDirectory() as name:
            try:
                lines += serve(target, job, pythons[job.consumer], source, Path(name) / "out")
            except MpqError as error:
                print(f"{target}: {error}")
                lines.append(result(f"{target}_written", 0, ">=1", False))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
