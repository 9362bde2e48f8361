"""ResNet-20 in integer-only arithmetic (int32 sums, dyadic rescaling): our simulation against ONNX Runtime, bit by bit.

    python -m experiments.papers.hawq_v3_integers [--quick]

Batch normalization is folded, weights are rounded per channel, activations have one static scale from calibration
images; accuracy on the 1,000 test images, beside the same schemes simulated in floating point. The mixed allocations
are HAWQ's: 4 or 8 bits of weights and activations by Hessian traces and an integer program, first and last layer in 8
bits, layers that read the same values tied, at fractions of the way from all 4 bits' operations to all 8 bits'.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import mpq
from experiments.models import reference_models
from experiments.result import result
from mpq.core.costs import bitops
from mpq.exporters.onnx.integer import export_integer, run_onnx
from mpq.integer_only import integer_program, residual_ties, run
from mpq.network.calibration import Batch, cross_entropy
from mpq.network.layers import find_layers
from mpq.network.ranges import input_ranges

UNIFORM = ("int8-channel+a:int8", "int4-channel+a:int8")
FOUR, EIGHT, ENDS = "int4-channel+a:uint4", "int8-channel+a:uint8", "int8-channel+a:int8"  # inputs come from a ReLU
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def mixed(model: nn.Module, batches: Sequence[Batch], images: Tensor) -> dict[str, mpq.Allocation]:
    """HAWQ's allocations, by name."""
    table = mpq.profile(model, batches[:2], cross_entropy, [FOUR, EIGHT, ENDS], metric="hessian", progress=False)
    table = replace(table, layers=residual_ties(model, table.layers, images))
    pins = dict.fromkeys((table.layers[0].name, table.layers[-1].name), ENDS)
    inner = [layer.name for layer in table.layers if layer.name not in pins]

    def operations(scheme: str) -> float:
        return sum(bitops(mpq.parse_scheme(pins.get(layer.name, scheme)), layer.macs) for layer in table.layers)

    found = {}
    for share in SHARES:
        budget = operations(FOUR) + share * (operations(EIGHT) - operations(FOUR))
        choice = mpq.allocate(
            table, bits=16.0, budgets={"bitops": budget}, pin=pins, forbid=dict.fromkeys(inner, ENDS)
        )  # fmt: skip
        found[f"mixed {share:.2f}"] = choice.allocation
    return found


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
    schemes = UNIFORM[:1] if options.quick else UNIFORM
    allocations = {scheme: mpq.Allocation(layers, (scheme,) * len(layers)) for scheme in schemes}
    allocations |= {} if options.quick else mixed(model, batches, calibration)
    print(f"floating point {_top1(model, images, labels):.1f} %")
    lines = []
    for name, allocation in allocations.items():
        program = integer_program(model, allocation, calibration)
        codes = program.codes(images)
        ours = run(program, codes)
        with tempfile.TemporaryDirectory() as folder:
            theirs = run_onnx(export_integer(program, Path(folder) / "model.onnx", codes), program, codes)
        simulated = mpq.simulate(model, allocation, trainable=False, ranges=ranges)
        top1, differing = 100 * float((ours.argmax(1) == labels).float().mean()), int((ours != theirs).sum())
        print(
            f"{name}, {allocation.bits:.2f} bits: integers {top1:.1f} %, simulated "
            f"{_top1(simulated, images, labels):.1f} %; {differing} of {ours.numel()} outputs differ in ONNX Runtime",
            flush=True,
        )
        lines.append(result(f"integers/{name.replace(' ', '_')}_differing", differing, "=0", differing == 0))
    print("\n" + "\n".join(lines))


@torch.no_grad()
def _top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
