"""Every export measured inside its consumer: quality before, simulated and as served; file size promised and real.

    python -m experiments.benchmarks.check_exports [--quick] [--llama PYTHON]

ResNet-20 on 1,000 CIFAR-10 images goes to ONNX Runtime, the WikiText Llama to transformers (our checkpoint and
compressed-tensors) and to llama.cpp (`llama_exports.py`). llama.cpp runs in an environment of its own, which the script
builds in some minutes (`--llama` names the Python of one that is there, `--quick` leaves it out).
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from experiments.in_turn import in_turn
from experiments.models import reference_models
from experiments.peers import llama_exports
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.mpq.state import other_state
from mpq.exporters.onnx.file import file_size
from mpq.network.calibration import mean_loss, next_token_loss
from mpq.network.layers import find_layers
from mpq.network.ranges import input_ranges
from mpq.quantized import simulate

ONNX = {
    "int8": ("int8-channel",),
    "mixed": ("int4-channel", "int8-channel", "int4-g32"),
    "int2": ("int8-channel", "int2-g16", "int4-g32"),
    "fp8": ("fp8-e4m3-channel",),
    "int8_activations": ("int8-channel+a:int8",),
    "mixed_activations": ("int8-channel+a:int8", "int4-channel+a:int8"),
    "fp8_activations": ("fp8-e4m3-channel+a:fp8-e4m3",),
}


def mixed(model: nn.Module, schemes: tuple[str, ...], embeddings: str = "bf16") -> Allocation:
    """Tied layers and the others take the schemes in turn; embeddings and what shares their weights `embeddings`."""
    layers = find_layers(model)
    pairs = zip(layers, in_turn(layers, schemes), strict=True)
    return Allocation(layers, tuple(embeddings if layer.kind == "embedding" else own for layer, own in pairs))


def promised(model: nn.Module, allocation: Allocation) -> int:
    """Bytes of the layers in their schemes and of everything else as it is."""
    return allocation.size + sum(tensor.nbytes for tensor in other_state(model, allocation)[0].values())


def row(name: str, before: float, simulated: float, served: float, sizes: tuple[int, int]) -> None:
    print(f"{name:28}{before:10.3f}{simulated:11.3f}{served:10.3f}{sizes[0]:12,}{sizes[1]:12,}", flush=True)


def gap_result(name: str, gap: float, limit: float) -> str:
    return result(name, gap, f"<={limit}", gap <= limit)


def onnxruntime_top1(images: int, folder: Path) -> list[str]:
    import onnxruntime

    model, batches = reference_models.resnet(20), reference_models.cifar10_test(images)[:1]
    inputs, layers = batches[0][0][:2], find_layers(model)
    calibration = reference_models.cifar10_calibration(128)
    ranges = input_ranges(model, layers, calibration, lambda model, batch: model(batch[0]))
    before, lines = 100 * reference_models.top1(model, batches), []
    for name, schemes in list(ONNX.items())[: None if images >= 1000 else 3]:
        allocation = mixed(model, schemes)
        promised_size = file_size(model, allocation, inputs)
        out = export(model, allocation, folder / f"onnx-{name}", to="onnx", inputs=inputs, ranges=ranges)
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        key = session.get_inputs()[0].name
        served = 100 * reference_models.top1(
            lambda x, session=session, key=key: torch.from_numpy(session.run(None, {key: x.numpy()})[0]), batches
        )
        simulated = 100 * reference_models.top1(simulate(model, allocation, trainable=False, ranges=ranges), batches)
        sizes = promised_size, (out / "model.onnx").stat().st_size
        row(f"onnxruntime {name}", before, simulated, served, sizes)
        lines.append(gap_result(f"onnxruntime_{name}_top1_gap", abs(served - simulated), 0.2))
        lines.append(gap_result(f"onnxruntime_{name}_size_gap", abs(sizes[1] / sizes[0] - 1), 0.01))
    return lines


def language_models(windows: int, folder: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    import mpq.integrations.transformers  # noqa: F401  (registers mpq with transformers)

    model, tokens = reference_models.wikitext_llama(), reference_models.wikitext_tokens("test", windows)
    ours = ("int4-g128", "int3-g64", "int8-channel", "nvfp4")
    jobs = [("mpq", ours, "model.safetensors"), ("compressed-tensors", ours[:3], "model.safetensors")]
    before, lines = math.exp(mean_loss(model, [tokens], next_token_loss)), []
    for target, schemes, file in jobs:
        name = f"transformers {target}"
        allocation = mixed(model, schemes)
        out = export(model, allocation, folder / name.replace(" ", "-"), to=target)
        simulated = math.exp(mean_loss(simulate(model, allocation, trainable=False), [tokens], next_token_loss))
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        served = math.exp(mean_loss(loaded, [tokens], next_token_loss))
        sizes = promised(model, allocation), (out / file).stat().st_size
        row(name, before, simulated, served, sizes)
        lines.append(gap_result(f"{name}_size_gap", abs(sizes[1] / sizes[0] - 1), 0.01))
        lines.append(gap_result(f"{name}_perplexity_gap", abs(served / simulated - 1), 0.001))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, without llama.cpp")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    options = parser.parse_args()
    with reference_models.skipping():
        reference_models.data_file("wikitext2_llama_5m")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'consumer':28}{'before':>10}{'simulated':>11}{'served':>10}{'promised':>12}{'file':>12}")
        lines = onnxruntime_top1(200 if options.quick else 1000, folder)
        lines += language_models(4 if options.quick else 32, folder)
        if not options.quick:
            lines += llama_exports.exports(options.llama or llama_exports.build(folder / "llama"), 32, folder)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
