"""Folders as `mpq quantize --for TARGET` writes them by default, served by the target: perplexity simulated and served.

    python -m experiments.peers.served_defaults [--vllm PYTHON] [--llama PYTHON] [--nsamples N]

The WikiText Llama at 4.5 bits for vLLM on a CPU (its embedding left out: vLLM holds none) and for llama.cpp. What was
simulated is the folder, read by our own readers; the file's size is compared with the promise.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from experiments.models import reference_models
from experiments.peers import llama_exports, vllm_exports
from experiments.result import result
from mpq.exporters.opening import open_any
from mpq.exporters.targets import TARGETS
from mpq.exporting import sizer_for
from mpq.network.calibration import mean_loss, next_token_loss
from mpq.pipeline import quantize_model
from mpq.sources import open_source

BITS, WINDOWS = 4.5, 8
EXCLUDED = {"vllm:cpu": ("model.embed_tokens",), "llama.cpp": ()}
FILES = {"vllm:cpu": "model.safetensors", "llama.cpp": "model.gguf"}


def served(target: str, python: str, nsamples: int, folder: Path) -> list[str]:
    """Quantize, serve and compare; the RESULT lines."""
    tokens = reference_models.wikitext_tokens("test", WINDOWS)
    source = open_source(str(reference_models.data_file("wikitext2_llama_5m")), nsamples=nsamples)
    outcome = quantize_model(source, folder, bits=BITS, target=target, exclude=EXCLUDED[target], progress=False)
    simulated = math.exp(mean_loss(open_any(folder).model, [tokens], next_token_loss))
    if target == "llama.cpp":
        found = llama_exports.served_perplexity(python, folder, tokens)
    else:
        windows = folder.parent / "windows.json"
        windows.write_text(json.dumps(tokens.tolist()))
        found = vllm_exports.served_perplexity(python, folder, windows, "bfloat16")
    promised = sizer_for(TARGETS[target], source)(outcome.allocation)
    written, gap = (folder / FILES[target]).stat().st_size, abs(found / simulated - 1)
    print(
        f"{target:10} {outcome.allocation.bits:.3f} bits in {outcome.seconds:.0f} s, simulated {simulated:.4f}, "
        f"served {found:.4f}, promised {promised:,} bytes, written {written:,}", flush=True,
    )  # fmt: skip
    return [
        result(f"{target}_default_perplexity_gap", gap, "<=0.002", gap <= 0.002),
        result(f"{target}_default_size_gap", abs(written - promised), "<=0", written == promised),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="", help="Python of an environment with vLLM")
    parser.add_argument("--llama", default="", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default: 128)")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for target, python in (("llama.cpp", options.llama), ("vllm:cpu", options.vllm)):
            if python:
                lines += served(target, python, options.nsamples, Path(name) / target.replace(":", "-"))
            else:
                print(f"{target}: skipped, no environment named")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
