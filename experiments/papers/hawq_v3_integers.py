"""ResNet-20 in integers alone: int32 sums, dyadic rescaling, by our simulation and by ONNX Runtime, bit for bit.

    python -m experiments.papers.hawq_v3_integers [--quick]

Batch normalization is folded, weights are rounded per channel, activations have one static scale from 512 calibration
images; accuracy on the 1,000 test images, beside the same schemes simulated in floating point.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import mpq
from experiments.models import reference_models
from experiments.result import result
from mpq.exporters.onnx.integer import export_integer, run_onnx
from mpq.integer_only import integer_program, residual_ties, run
from mpq.network.layers import find_layers
from mpq.network.ranges import input_ranges

SCHEMES = ("int8-channel+a:int8", "int4-channel+a:int8", "int4-channel+a:int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one scheme, 100 images")
    options = parser.parse_args()
    model = reference_models.resnet(20)
    images, labels = (torch.cat(parts) for parts in zip(*reference_models.cifar10_test(), strict=True))
    batches = reference_models.cifar10_calibration(64 if options.quick else 512)
    calibration = torch.cat([inputs for inputs, _ in batches])
    if options.quick:
        images, labels = images[:100], labels[:100]
    layers = residual_ties(model, find_layers(model), calibration)
    ranges = input_ranges(model, layers, batches, lambda module, batch: module(batch[0]))
    accuracy = {"float": _top1(model(images), labels)}
    lines = []
    for scheme in SCHEMES[:1] if options.quick else SCHEMES:
        allocation = mpq.Allocation(layers, (scheme,) * len(layers))
        program = integer_program(model, allocation, calibration)
        codes = program.codes(images)
        ours = run(program, codes)
        with tempfile.TemporaryDirectory() as folder:
            path = export_integer(program, Path(folder) / "model.onnx", codes)
            theirs, size = run_onnx(path, program, codes), path.stat().st_size
        simulated = mpq.simulate(model, allocation, trainable=False, ranges=ranges)
        with torch.no_grad():
            accuracy |= {scheme: _top1(ours, labels), f"{scheme} simulated": _top1(simulated(images), labels)}
        differing = int((ours != theirs).sum())
        print(
            f"{scheme}: integers {accuracy[scheme]:.1f} %, simulated {accuracy[f'{scheme} simulated']:.1f} % (float "
            f"{accuracy['float']:.1f} %), {size} bytes; {differing} of {ours.numel()} outputs differ in ONNX Runtime"
        )
        lines.append(result(f"integers/{scheme}_differing", differing, "=0", differing == 0))
    print("\n" + "\n".join(lines))


@torch.no_grad()
def _top1(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((outputs.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
