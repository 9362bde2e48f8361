"""Every export measured inside its consumer: quality before, simulated and as served; file size promised and real.

    python experiments/check_exports.py [--quick] [--llama PYTHON]

ResNet-20 on 1,000 CIFAR-10 images goes to ONNX Runtime, the WikiText Llama to transformers (our checkpoint and
compressed-tensors) and to llama.cpp. llama.cpp runs in an environment of its own, which the script builds in some
minutes (`--llama` names the Python of one that is there, `--quick` leaves it out).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from torch import nn

import reference_models
from mpq.core.allocation import Allocation
from mpq.core.calibration import mean_loss, next_token_loss
from mpq.core.errors import MpqError
from mpq.core.layers import find_layers
from mpq.exporters import exporter_named
from mpq.exporters.state import other_state
from mpq.quantized import simulate

# Without AVX-512 and AMX: not every virtual machine that announces AMX lets programs use it.
BUILD = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAMA_BUILD_TOOLS=OFF"
PERPLEXITY = """
import json, math, sys
import numpy as np
from llama_cpp import Llama
windows = json.load(open(sys.argv[2]))
model = Llama(sys.argv[1], n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True, verbose=False, n_threads=2)
total = count = 0
for row in windows:
    model.reset()
    model.eval(row)
    scores = np.array(model.scores[: len(row)], dtype=np.float64)
    top = scores.max(1)
    losses = np.log(np.exp(scores - top[:, None]).sum(1)) + top
    total += (losses[:-1] - scores[np.arange(len(row) - 1), row[1:]]).sum()
    count += len(row) - 1
print(math.exp(total / count))
"""


def mixed(model: nn.Module, schemes: tuple[str, ...], embeddings: str = "bf16") -> Allocation:
    """Tied layers and the others take the schemes in turn; embeddings and what shares their weights `embeddings`."""
    layers = find_layers(model)
    keys = list(dict.fromkeys(layer.tie or layer.name for layer in layers))
    turn = {key: schemes[index % len(schemes)] for index, key in enumerate(keys)}
    picked = (embeddings if layer.kind == "embedding" else turn[layer.tie or layer.name] for layer in layers)
    return Allocation(layers, tuple(picked))


def promised(model: nn.Module, allocation: Allocation) -> int:
    """Bytes of the layers in their schemes and of everything else as it is."""
    return allocation.size + sum(tensor.nbytes for tensor in other_state(model, allocation)[0].values())


def row(name: str, before: float, simulated: float, served: float, sizes: tuple[int, int]) -> None:
    print(f"{name:28}{before:10.3f}{simulated:11.3f}{served:10.3f}{sizes[0]:12,}{sizes[1]:12,}", flush=True)


def result(name: str, value: float, limit: float) -> str:
    return f"RESULT {name} {value:.5f} <={limit} {'ok' if value <= limit else 'short'}"


def onnxruntime_top1(images: int, folder: Path) -> list[str]:
    import onnxruntime

    model, batches = reference_models.resnet(20), reference_models.cifar10_test(images)[:1]
    before, lines = 100 * reference_models.top1(model, batches), []
    for name, schemes in (("int8", ("int8-channel",)), ("mixed", ("int4-channel", "int8-channel", "int4-g32"))):
        allocation = mixed(model, schemes)
        out = exporter_named("onnx")(model, allocation, folder / f"onnx-{name}", inputs=batches[0][0][:2])
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        key = session.get_inputs()[0].name
        served = 100 * reference_models.top1(
            lambda x, session=session, key=key: torch.from_numpy(session.run(None, {key: x.numpy()})[0]), batches
        )
        simulated = 100 * reference_models.top1(simulate(model, allocation, trainable=False), batches)
        sizes = promised(model, allocation), (out / "model.onnx").stat().st_size
        row(f"onnxruntime {name}", before, simulated, served, sizes)
        lines.append(result(f"onnxruntime_{name}_top1_gap", abs(served - simulated), 0.2))
    return lines


def language_models(windows: int, folder: Path, llama: str | None) -> list[str]:
    from transformers import AutoModelForCausalLM

    import mpq.exporters.hf  # noqa: F401  (registers mpq with transformers)

    model, tokens = reference_models.wikitext_llama(), reference_models.wikitext_tokens("test", windows)
    ours, blocks = ("int4-g128", "int3-g64", "int8-channel", "nvfp4"), ("int4-g32", "int8-g32", "int5-g32", "mxfp4")
    jobs = [("mpq", ours, "model.safetensors"), ("compressed-tensors", ours[:3], "model.safetensors")]
    jobs += [("gguf", blocks, "model.gguf"), ("gguf", ("fp32",), "model.gguf")] if llama else []
    before, lines = math.exp(mean_loss(model, [tokens], next_token_loss)), []
    for target, schemes, file in jobs:
        name = {"gguf": "llama.cpp"}.get(target, f"transformers {target}") + (" fp32" if schemes == ("fp32",) else "")
        allocation = mixed(model, schemes, schemes[0] if target == "gguf" else "bf16")
        out = exporter_named(target)(model, allocation, folder / name.replace(" ", "-"))
        simulated = math.exp(mean_loss(simulate(model, allocation, trainable=False), [tokens], next_token_loss))
        if target == "gguf":
            served = llama_perplexity(str(llama), out / file, tokens, folder)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
            served = math.exp(mean_loss(loaded, [tokens], next_token_loss))
        row(name, before, simulated, served, (promised(model, allocation), (out / file).stat().st_size))
        limit = 0.01 if target == "gguf" else 0.001
        lines.append(result(f"{name.replace(' ', '_')}_perplexity_gap", abs(served / simulated - 1), limit))
    return lines


def llama_perplexity(python: str, file: Path, tokens: torch.Tensor, folder: Path) -> float:
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    command = [python, "-c", PERPLEXITY, str(file), str(folder / "tokens.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"llama.cpp failed on {file.name} with {done.returncode}: {done.stderr[-300:]}")
        return math.nan
    return float(done.stdout)


def build_llama(folder: Path) -> str:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    environment = {**os.environ, "CMAKE_ARGS": BUILD}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "llama-cpp-python"], env=environment, check=True, timeout=3600
    )
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, without llama.cpp")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    options = parser.parse_args()
    try:
        reference_models.data_file("wikitext2_llama_5m")
    except MpqError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama = None if options.quick else options.llama or build_llama(folder / "llama")
        print(f"{'consumer':28}{'before':>10}{'simulated':>11}{'served':>10}{'promised':>12}{'file':>12}")
        lines = onnxruntime_top1(200 if options.quick else 1000, folder)
        lines += language_models(4 if options.quick else 32, folder, llama)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
