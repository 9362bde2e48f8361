"""A network as a list of integer operations, and its reference run in int64, which every other runner must equal."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HEADROOM = 61  # bits of sums before they are shifted: with the half that rounds they stay within int64
MULTIPLIER_BITS = 31


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: its inputs and output by name, and its constants.

    conv, linear: `weight` int64 (out, in / groups, *kernel) or (out, in), `bias` int64 (out,); the sum fits int32.
    rescale: the inputs times `multipliers` (int64, (channels,) or (1,) each), added, shifted right by `shift` bits with
        halves rounded up, and clipped to `low` and `high`. Multipliers and shift are dyadic numbers m / 2**shift.
    sum: over the dimensions `dims`. pad: zeros. maxpool, slice, flatten: of codes, as in PyTorch.
    """

    operation: str
    inputs: tuple[str, ...]
    output: str
    values: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """Integer operations from the codes of images to the codes of outputs."""

    steps: tuple[Step, ...]
    input: str
    output: str
    input_scale: float
    input_bounds: tuple[int, int]  # smallest and largest code
    output_scale: float
    offsets: Mapping[str, int]  # added to make stored codes unsigned, by name

    def codes(self, images: Tensor) -> Tensor:
        """The images' codes, int64."""
        return (images.double() / self.input_scale).round().clamp(*self.input_bounds).long()

    def __call__(self, images: Tensor) -> Tensor:
        """The outputs of float images, float32: rounded codes on the way in, one scale on the way out."""
        return (run(self, self.codes(images)) * self.output_scale).float()


def run(program: IntegerProgram, codes: Tensor) -> Tensor:
    """Output codes of input codes, int64 both.

    Products and sums of integers are computed in float64, which holds them exactly: none exceeds 2**31.
    """
    known = {program.input: codes}
    for step in program.steps:
        known[step.output] = OPERATIONS[step.operation](*(known[name] for name in step.inputs), **step.values)
    return known[program.output]


def rescaled(*terms: Tensor, multipliers: tuple[Tensor, ...], shift: int, low: int, high: int) -> Tensor:
    """The dyadic sum of terms (batch, channels, ...), rounded and clipped."""
    shapes = [(1, -1, *(1,) * (term.ndim - 2)) for term in terms]
    products = [term * m.view(shape) for term, m, shape in zip(terms, multipliers, shapes, strict=True)]
    total = functools.reduce(torch.add, products) + (1 << shift >> 1)
    return (total >> shift).clamp(low, high)


def dyadic(ratios: list[Tensor], bounds: list[float]) -> tuple[tuple[Tensor, ...], int]:
    """Multipliers m and a shift so that m / 2**shift is each ratio of scales (negative ones included), as exact as
    `MULTIPLIER_BITS` and the largest magnitudes `bounds` of the terms allow.
    """
    sizes = [float(ratio.abs().max()) for ratio in ratios]
    total, largest = sum(size * bound for size, bound in zip(sizes, bounds, strict=True)), max(sizes)
    limits = (2.0**HEADROOM / total, 2.0**MULTIPLIER_BITS / largest, 2.0**HEADROOM)
    shift = max(0, math.ceil(math.log2(min(limits))) - 1)
    return tuple((ratio.double() * 2**shift).round().long() for ratio in ratios), shift


def _conv(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    convolution = functional.conv2d if weight.ndim == 4 else functional.conv1d
    outputs: Tensor = convolution(x.double(), weight.double(), bias.double(), **options)
    return outputs.long()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x.double(), weight.double(), bias.double()).long()


def _maxpool(x: Tensor, **options: Any) -> Tensor:
    pooled: Tensor = functional.max_pool2d(x.double(), **options)
    return pooled.long()


def _slice(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, end, step),)]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "conv": _conv, "linear": _linear, "rescale": rescaled, "maxpool": _maxpool, "slice": _slice,
    "sum": lambda x, dims, keepdim: x.sum(dims, keepdim=keepdim),
    "pad": lambda x, sides: functional.pad(x, sides),
    "flatten": lambda x: x.flatten(1),
}  # fmt: skip
