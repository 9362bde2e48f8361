"""ONNX exports in ONNX Runtime: top-1 accuracy of ResNet-20 simulated and served, file sizes.

    python -m experiments.peers.onnx_exports [--quick]

ResNet-20 on 1,000 CIFAR-10 images, in mixes of integers and fp8, activations rounded or not. `--quick` takes 200 images
and three mixes.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from experiments.in_turn import in_turn
from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.onnx.file import file_size
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


def mixed(model: nn.Module, schemes: tuple[str, ...]) -> Allocation:
    """Assign schemes round-robin."""
    layers = find_layers(model)
    return Allocation(layers, tuple(in_turn(layers, schemes)))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 images and three mixes")
    options = parser.parse_args()
    with reference_models.skipping(), tempfile.TemporaryDirectory() as name:
        print(f"{'consumer':28}{'before':>10}{'simulated':>11}{'served':>10}{'promised':>12}{'file':>12}")
        print("\n".join(onnxruntime_top1(200 if options.quick else 1000, Path(name))))


if __name__ == "__main__":
    main()
