"""Scales chosen with all weights alike, and with large weights counted more, under GPTQ.

    python -m experiments.benchmarks.bench_importance [--quick] [--draws N]

KL divergence from the original of uniform formats, on data that nothing was fitted to; layers whose rows do not divide
into super-blocks stay bfloat16. The WikiText Llama (24 test windows) and ResNet-20 and -56 (1,000 images). The goal is
of the formats of 3 bits and fewer, which count large weights more.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding import gptq
from mpq.rounding.store import moments_needed

LANGUAGE = ("q2_k", "int2-g32", "q3_k", "int3-g32", "q4_k", "iq4_nl", "int4-g32")
IMAGES = ("int2-g32", "int3-channel", "int3-g32", "int4-channel")


@dataclass(frozen=True, eq=False)
class Case:
    """A model with data to calibrate on and inputs to measure on."""

    name: str
    model: nn.Module
    formats: Sequence[str]
    calibration: tuple[Batch, ...]
    loss_fn: LossFn
    inputs: tuple[Tensor, ...]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        found = (model(inputs) for inputs in self.inputs)
        return [getattr(one, "logits", one).float().log_softmax(-1) for one in found]


def cases(draw: int, quick: bool) -> Iterator[Case]:
    windows = 4 if quick else 32
    train = reference_models.wikitext_tokens("train", windows * (draw + 1))[windows * draw :]
    test = reference_models.wikitext_tokens("test", 2 if quick else 24)
    formats = LANGUAGE[:2] if quick else LANGUAGE
    yield Case("Llama", reference_models.wikitext_llama(), formats, train.split(8), next_token_loss, test.split(1))
    for depth in () if quick else (20, 56):
        images = tuple(inputs for inputs, _ in reference_models.cifar10_test(250))
        calibration = reference_models.cifar10_calibration(256 * (draw + 1))[4 * draw :]
        yield Case(f"ResNet-{depth}", reference_models.resnet(depth), IMAGES, calibration, cross_entropy, images)


def divergences(case: Case) -> Iterator[tuple[str, float, float]]:
    """Each format's KL with all weights alike, and with large ones counted more."""
    layers, original = find_layers(case.model), case.outputs(case.model)
    moments = moments_needed("gptq", case.model, layers, case.calibration, case.loss_fn)
    for name in case.formats:
        blocks = "super-blocks" if parse_scheme(name).weight.super_group else ""
        schemes = [
            "bf16" if blocks and TARGETS["gguf"].refusal(layer, parse_scheme(name)) else name for layer in layers
        ]
        found = []
        for few in (0, 8):
            with patch.object(gptq, "FEW_BITS", few):
                model = simulate(case.model, Allocation(layers, tuple(schemes)), "gptq", moments, trainable=False)
            pairs = zip(original, case.outputs(model), strict=True)
            found.append(float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs]).mean()))
        yield name, found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2, help="of calibration data (default: 2)")
    parser.add_argument("--quick", action="store_true", help="two formats of the Llama, few windows, one draw")
    options = parser.parse_args()
    try:
        reference_models.data_file("wikitext2_llama_5m")
    except MpqError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    lines = []
    for draw in range(1 if options.quick else options.draws):
        for case in cases(draw, options.quick):
            for name, alike, sized in divergences(case):
                ratio, few = sized / alike, parse_scheme(name).weight.grid.bits <= gptq.FEW_BITS
                print(
                    f"draw {draw} {case.name:10} {name:13} {alike:9.5f} {sized:9.5f} {100 * ratio - 100:6.1f} %",
                    flush=True,
                )
                if few:
                    lines.append(result(f"importance_{draw}_{case.name}_{name}_kl_ratio", ratio, "<1", ratio < 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
