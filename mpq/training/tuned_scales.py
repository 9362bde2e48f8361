"""Scales tuned against the float model, with fixed codes, to lower the divergence of the outputs.

All layers are tuned together with the original model as the teacher, which corrects accumulated errors of several
layers, unlike rounding each layer separately. On a language model at 3 bits this removes a quarter of the loss of
GPTQ's rounding (experiments/benchmarks/bench_tuned_scales.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from tqdm import tqdm

from mpq.core.allocation import Allocation
from mpq.network.batchnorm import put_means
from mpq.network.calibration import (
    ELEMENTS,
    Batch,
    LossFn,
    counted_positions,
    evaluating,
    outputs_of,
    seeded,
)
from mpq.network.copies import copied
from mpq.network.layers import is_transposed, shaped
from mpq.network.samples import Arrangement, arrangement
from mpq.network.storage import release_memory
from mpq.quantized import checked_layers, round_inputs
from mpq.rounding.codes import COPY_DTYPES
from mpq.rounding.reference import Quantized, dequantize, group_scales, storable_scales, to_groups


@dataclass(frozen=True)
class Tuning:
    """Steps and rates of tuning scales; the learning rate is relative to each scale."""

    steps: int = 60
    samples: int = 4  # samples of a step; 32 for images, which have one prediction each
    rate: float = 2e-3  # Adam's rate, falling to zero along half a cosine
    seed: int = 0


def tune_scales(
    model: nn.Module,
    allocation: Allocation,
    rounded: Mapping[str, Quantized],
    batches: Sequence[Batch],
    loss_fn: LossFn,
    tuning: Tuning = Tuning(),
    means: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Quantized]:
    """The rounded weights, by layer name, with scales that lower the mean KL divergence from the model.

    Formats whose scales are no 16- or 32-bit floats keep their tables. Positions that do not count
    (`mpq.network.calibration.counted_positions`) have no divergence.

    Args:
        model: the float model, the teacher; left as it is.
        allocation: whose layers `rounded` holds.
        rounded: codes and tables of every layer.
        batches: calibration data; steps take samples from them in a random order.
        loss_fn: calls the model on a batch; what it returns is not used.
        means: running means of batch normalizations that the rounded network has instead of the model's.
    """
    student, scaled = _student(model, allocation, rounded)
    put_means(student, means or {})
    shifts = [shift.requires_grad_() for weight in scaled.values() for shift in weight.parameters()]
    if not shifts or tuning.steps < 1:
        return dict(rounded)
    optimizer = torch.optim.Adam(shifts, tuning.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / tuning.steps)
    )
    arranged = arrangement(model, batches, loss_fn)
    steps = _steps(batches, tuning, arranged)
    with evaluating(model), evaluating(student), torch.enable_grad():
        for _ in tqdm(range(tuning.steps), desc="tuning scales", disable=None if progress else True, leave=False):
            optimizer.zero_grad()
            with computed_once(list(scaled.values())):
                _add_gradients(model, student, next(steps), loss_fn, arranged)
            optimizer.step()
            schedule.step()
            release_memory()
    return {name: weight.quantized() for name, weight in scaled.items()}


def _student(
    model: nn.Module, allocation: Allocation, rounded: Mapping[str, Quantized]
) -> tuple[nn.Module, dict[str, "ScaledWeight"]]:
    """A copy of the model that computes from the rounded weights, by layer name, and shares all of its parameters."""
    shared = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    student = copied(model, shared)
    scaled: dict[str, ScaledWeight] = {}
    for layer, scheme in checked_layers(student, allocation):
        modules = [student.get_submodule(name) for name in layer.names]
        weight: Tensor = modules[0].weight  # type: ignore[assignment]
        place = partial(shaped, shape=weight.shape, transposed=is_transposed(layer.kind))
        scaled[layer.name] = ScaledWeight(rounded[layer.name], place, weight.dtype)
        for module in dict.fromkeys(modules):
            parametrize.register_parametrization(module, "weight", scaled[layer.name], unsafe=True)
        round_inputs(modules, scheme)
    return student, scaled


def _add_gradients(
    teacher: nn.Module, student: nn.Module, batch: Batch, loss_fn: LossFn, arranged: Arrangement
) -> None:
    """Add the gradients of a batch's mean divergence, in parts that keep a vocabulary's logits small."""
    samples, start, few = arranged.count(batch), 0, 1
    while start < samples:
        part = arranged.take(batch, slice(start, start + few))
        with torch.no_grad():
            wanted = _logits(teacher, part, loss_fn)
        logits = _logits(student, part, loss_fn)
        counted = next((mask for mask in counted_positions(part) if mask.shape == logits.shape[:-1]), None)
        _, gradient = divergence(logits.detach(), wanted, counted)
        logits.backward(gradient * (arranged.count(part) / samples))  # type: ignore[no-untyped-call]
        start += arranged.count(part)
        few = max(1, ELEMENTS * arranged.count(part) // logits.numel())


@torch.no_grad()
def divergence(logits: Tensor, wanted: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean KL divergence of softmax(logits) from softmax(wanted), and its gradient with respect to the logits.

    Args:
        logits: (..., classes).
        wanted: (..., classes), the teacher's.
        counted: (...), the positions that count.
    """
    logs, targets = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    each = functional.kl_div(logs, targets, log_target=True, reduction="none").sum(-1)
    weights = torch.ones_like(each) if counted is None else counted.to(each)
    weights /= weights.sum().clamp(min=1)
    gradient = logs.exp_().sub_(targets.exp_()).mul_(weights.unsqueeze(-1))
    return (each * weights).sum(), gradient.to(logits.dtype)


def _steps(batches: Sequence[Batch], tuning: Tuning, arranged: Arrangement) -> Iterator[Batch]:
    """Batches of the wanted number of samples, all data in a new random order each time round."""
    generator = seeded(tuning.seed, "tuning scales")
    pieces = [
        arranged.take(batch, slice(start, start + tuning.samples))
        for batch in batches
        for start in range(0, arranged.count(batch), tuning.samples)
    ]
    while True:
        for index in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[index]


def _logits(model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
    with outputs_of(model) as outputs:
        loss_fn(model, batch)
    return outputs[0]


@contextmanager
def computed_once(weights: Sequence["ScaledWeight"]) -> Iterator[None]:
    """Compute the weights once for all passes inside the block; at its end their gradients are those of the scales."""
    computed = [weight.computed() for weight in weights]
    for weight, numbers in zip(weights, computed, strict=True):
        weight.held = numbers.detach().requires_grad_(numbers.requires_grad)
    try:
        yield
        for weight in weights:
            gradient = None if weight.held is None else weight.held.grad
            weight.held, numbers = None, computed.pop(0)
            if gradient is not None:
                numbers.backward(gradient)  # type: ignore[no-untyped-call]
    finally:
        for weight in weights:
            weight.held = None


class ScaledWeight(nn.Module):
    """A parametrization that ignores its weight and gives the codes' numbers, with scales that can be learned.

    Args:
        quantized: codes and tables, of one format or of a mix.
        place: from the matrix (rows, cols) to the shape of the weight.
        dtype: of the weight.
    """

    def __init__(self, quantized: Quantized, place: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.rounded, self.place, self.dtype = quantized, place, dtype
        self.parts = nn.ModuleList(ScaledWeight(part, lambda matrix: matrix, dtype) for part in quantized.parts)
        self.shift: nn.Parameter | None = None
        self.held: Tensor | None = None  # the weight inside `computed_once`
        if quantized.format.scale in COPY_DTYPES and not quantized.parts:  # coarser types would round small steps away
            self.shift = nn.Parameter(torch.zeros_like(group_scales(quantized)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight from the codes and the current scales."""
        return self.computed() if self.held is None else self.held

    def computed(self) -> Tensor:
        """The weight, with a graph to the scales."""
        if self.parts:
            order = torch.cat(self.rounded.part_rows()).argsort()
            return self.place(torch.cat([part.computed() for part in self.parts])[order])  # type: ignore[operator]
        if self.shift is None:
            return self.place(dequantize(self.rounded)).to(self.dtype)
        numbers: Tensor = _Scaled.apply(self.shift, self.rounded)  # type: ignore[no-untyped-call]
        return self.place(numbers).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Required by torch; the written weight is not used."""
        return weight

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The codes with the scales rounded to their stored type."""
        if self.parts:
            return replace(self.rounded, parts=tuple(part.quantized() for part in self.parts))  # type: ignore[operator]
        if self.shift is None:
            return self.rounded
        assert self.rounded.scales is not None
        scales = self.rounded.scales * self.shift.detach().exp()
        return replace(self.rounded, scales=storable_scales(scales, self.rounded.format))


class _Scaled(torch.autograd.Function):
    """Numbers of the codes with scales times exp(shift); nothing but the codes is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor, rounded: Quantized) -> Tensor:
        ctx.rounded = rounded
        ctx.save_for_backward(shift)
        assert rounded.scales is not None
        return dequantize(replace(rounded, scales=rounded.scales * shift.exp()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (shift,) = ctx.saved_tensors
        rounded: Quantized = ctx.rounded
        assert rounded.scales is not None
        minima = None if rounded.minima is None else torch.zeros_like(rounded.minima)
        numbers = dequantize(replace(rounded, scales=rounded.scales * shift.exp(), minima=minima))
        return to_groups(gradient.float() * numbers, rounded.format).sum(-1), None
