"""How to weight errors when GPTQ's scales are chosen: columns by their inputs, large weights more or not.

    python -m experiments.benchmarks.bench_importance [--quick] [--models Llama SmolLM2 ...] [--draws N]

KL divergence from the original of uniform formats on held-out data: the WikiText Llama, SmolLM2 (16 windows), ResNet-20
and -56 (1,000 images). The goal compares the built-in rule with weighting columns by the diagonal of the inputs' second
moment itself.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from unittest.mock import patch

import torch
from torch import Tensor, nn

from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.formats import Format
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding import gptq
from mpq.rounding.clip_search import clip_search
from mpq.rounding.reference import Quantized
from mpq.rounding.store import moments_needed

LANGUAGE = ("int2-g64", "int3-g64", "int4-g64", "int3-channel", "int4-channel")
IMAGES = ("int2-g32", "int3-channel", "int4-channel")


Importance = Callable[[Tensor, int], Tensor]
BUILT_IN: Importance = gptq._importance
# Powers of the built-in weighting, the root of the diagonal. "sizes" also multiplies by the root of the row's mean
# square plus the weight's own square, as llama.cpp's quantizer does.
RULES = {"diagonal": 2.0, "root": 1.0, "alike": 0.0, "sizes": 1.0}


def by_sizes(search: Callable[..., Quantized]) -> Callable[..., Quantized]:
    """A clip search that weights errors of large weights more."""

    def sized(weight: Tensor, format: Format, importance: Tensor | None = None) -> Quantized:
        squares = weight.square()
        sizes = (squares + squares.mean(-1, keepdim=True)).sqrt()
        return search(weight, format, importance=sizes if importance is None else sizes * importance)

    return sized


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

    @cached_property
    def original(self) -> list[Tensor]:
        """The outputs of the model itself."""
        return self.outputs(self.model)

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments of the layers' inputs on the calibration data."""
        return dict(moments_needed("gptq", self.model, find_layers(self.model), self.calibration, self.loss_fn))

    def divergence(self, name: str) -> Tensor:
        """KL divergence of every prediction in a uniform format, rounded by GPTQ."""
        layers = find_layers(self.model)
        allocation = Allocation(layers, (name,) * len(layers))
        rounded = simulate(self.model, allocation, "gptq", self.moments, trainable=False)
        pairs = zip(self.original, self.outputs(rounded), strict=True)
        return torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs])


def cases(draw: int, quick: bool) -> Iterator[Case]:
    """Models with the calibration data of one draw; only the first if `quick`."""
    windows = 4 if quick else 32
    train = reference_models.wikitext_tokens("train", windows * (draw + 1))[windows * draw :]
    test = reference_models.wikitext_tokens("test", 2 if quick else 24)
    formats = LANGUAGE[1:2] if quick else LANGUAGE
    yield Case("Llama", reference_models.wikitext_llama(), formats, train.split(8), next_token_loss, test.split(1))
    for depth in () if quick else (20, 56):
        images = tuple(inputs for inputs, _ in reference_models.cifar10_test(250))
        calibration = reference_models.cifar10_calibration(256 * (draw + 1))[4 * draw :]
        yield Case(f"ResNet-{depth}", reference_models.resnet(depth), IMAGES, calibration, cross_entropy, images)
    if not quick:
        model, tokens = reference_models.smollm2(windows * (draw + 1) + 16)
        yield Case(
            "SmolLM2", model, LANGUAGE, tokens[16:][windows * draw :].split(8), next_token_loss, tokens[:16].split(1)
        )


def divergences(case: Case) -> Iterator[tuple[str, dict[str, float]]]:
    """Each format's KL by every rule."""
    for name in case.formats:
        found = {}
        for rule, power in RULES.items():
            search = by_sizes(clip_search) if rule == "sizes" else clip_search
            with (
                patch.object(gptq, "_importance", lambda hessian, rows, power=power: BUILT_IN(hessian, rows) ** power),
                patch.object(gptq, "clip_search", search),
            ):
                found[rule] = float(case.divergence(name).mean())
        yield name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1, help="of calibration data (default: 1)")
    parser.add_argument("--models", nargs="*", help="of those above (default: all)")
    parser.add_argument("--quick", action="store_true", help="one format of the Llama, few windows")
    options = parser.parse_args()
    with reference_models.skipping():
        reference_models.data_file("wikitext2_llama_5m")
    lines = []
    for draw in range(1 if options.quick else options.draws):
        for case in cases(draw, options.quick):
            if options.models and case.name not in options.models:
                continue
            for name, found in divergences(case):
                figures = "  ".join(f"{rule} {kl:.5f}" for rule, kl in found.items())
                print(f"draw {draw} {case.name:10} {name:13} {figures}", flush=True)
                ratio = found["root"] / found["diagonal"]
                lines.append(result(f"importance_{draw}_{case.name}_{name}_kl_ratio", ratio, "<=1", ratio <= 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
