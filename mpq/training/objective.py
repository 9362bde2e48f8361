"""Objectives of fine-tuning: the loss on data, the divergence from the float model, the distance of block outputs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, check_gradient, counted_positions, outputs_of
from mpq.network.samples import SAMPLES_FIRST, Arrangement, turned


@dataclass(frozen=True)
class Objective:
    """Weights of the parts of a fine-tuning's loss.

    Raises:
        MpqError: no positive weight, or a temperature that is not positive.
    """

    kl: float = 1.0  # mean KL(float model || student) of the predictions, times temperature**2
    task: float = 0.0  # what `loss_fn` gives
    blocks: float = 0.0  # squared distance of each block's outputs relative to the float model's, averaged over blocks
    temperature: float = 1.0  # divides both models' logits

    def __post_init__(self) -> None:
        if min(self.kl, self.task, self.blocks) < 0 or max(self.kl, self.task, self.blocks) == 0:
            raise MpqError("invalid objective: expected weights of at least 0, one of them positive")
        if self.temperature <= 0:
            raise MpqError(f"invalid temperature {self.temperature}: expected a positive number")


def objective_loss(
    student: nn.Module, teacher: nn.Module, batch: Batch, loss_fn: LossFn, objective: Objective
) -> Tensor:
    """The objective on a batch, a scalar, differentiable in the student."""
    names = block_names(teacher) if objective.blocks else ()
    distils = bool(objective.kl or objective.blocks)
    if distils:
        with torch.no_grad(), outputs_of(teacher) as wanted, _outputs_at(teacher, names) as expected:
            loss_fn(teacher, batch)
    with outputs_of(student) as given, _outputs_at(student, names) as actual:
        task = loss_fn(student, batch)
    nothing = torch.zeros((), device=task.device, dtype=torch.float32)
    total = objective.task * check_gradient(task) if objective.task else nothing
    if objective.kl:
        each, weights = divergences(_single(given), _single(wanted), batch, objective.temperature)
        total = total + objective.kl * objective.temperature**2 * (each * weights).sum() / weights.sum().clamp(min=1)
    if objective.blocks:
        total = (
            total
            + objective.blocks
            * torch.stack([_distance(one, other) for one, other in zip(actual, expected, strict=True)]).mean()
        )
    return check_gradient(total)


def divergences(logits: Tensor, wanted: Tensor, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(softmax(wanted) || softmax(logits)) of each prediction and its weight: 1, or 0 where it does not count.

    Args:
        logits: (..., classes).
        wanted: (..., classes), the teacher's.
        batch: whose masks say which positions count (`mpq.network.calibration.counted_positions`).
        temperature: divides both.
    """
    logs, targets = ((values.float() / temperature).log_softmax(-1) for values in (logits, wanted))
    each = functional.kl_div(logs, targets, log_target=True, reduction="none").sum(-1)
    counted = next((mask for mask in counted_positions(batch) if mask.shape == each.shape), None)
    return each, torch.ones_like(each) if counted is None else counted.to(each)


@torch.no_grad()
def harms(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], loss_fn: LossFn, objective: Objective,
    arranged: Arrangement = SAMPLES_FIRST,
) -> Tensor:  # fmt: skip
    """A student's harm on each sample, float64 (samples,): mean divergence, or the loss where none is asked for.

    Both models are run as they are: set them to evaluation mode.
    """
    if not objective.kl:
        return _harms_by_loss(student, teacher, tuple(batches), loss_fn, objective, arranged)
    harms: list[Tensor] = []
    for batch in batches:
        with outputs_of(teacher) as wanted:
            loss_fn(teacher, batch)
        with outputs_of(student) as given:
            loss_fn(student, batch)
        parts = divergences(_single(given), _single(wanted), batch)
        if arranged.second and parts[0].shape[1:2] == (arranged.count(batch),):
            parts = turned(parts[0]), turned(parts[1])
        each, weights = (part.reshape(len(part), -1) for part in parts)
        harms.append((each * weights).sum(1) / weights.sum(1).clamp(min=1))
    return torch.cat([harm.double().cpu() for harm in harms])


def _harms_by_loss(
    student: nn.Module, teacher: nn.Module, batches: tuple[Batch, ...], loss_fn: LossFn, objective: Objective,
    arranged: Arrangement,
) -> Tensor:  # fmt: skip
    """The objective of each sample, or of each batch if single samples have no loss."""
    singles = [arranged.take(batch, [sample]) for batch in batches for sample in range(arranged.count(batch))]
    values = [objective_value(student, teacher, one, loss_fn, objective).reshape(1) for one in singles]
    return torch.cat(values).double().cpu()


def objective_value(
    student: nn.Module, teacher: nn.Module, batch: Batch, loss_fn: LossFn, objective: Objective
) -> Tensor:
    """The objective without a gradient."""
    with torch.enable_grad():
        return objective_loss(student, teacher, batch, loss_fn, objective).detach()


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The blocks of a model: members of its outermost lists and sequences that hold parameters.

    Raises:
        MpqError: it has none.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside and name not in blocks:
            blocks += [
                f"{name}.{key}".lstrip(".")
                for key, child in module.named_children()
                if next(child.parameters(), None) is not None
            ]
    if not blocks:
        raise MpqError(f"{type(model).__name__} has no list or sequence of blocks: leave the weight of blocks at 0")
    return tuple(blocks)


@contextmanager
def _outputs_at(model: nn.Module, names: Iterable[str]) -> Iterator[list[Tensor]]:
    """The first output tensor of each of these modules, in the order of their calls."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))
        outputs.append(tensor)

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _single(outputs: list[Tensor]) -> Tensor:
    if len(outputs) != 1 or outputs[0].ndim < 2:
        raise MpqError(
            "the model gives no logits (one tensor, (samples, ..., classes)): take Objective(kl=0, task=1), or blocks=1"
        )
    return outputs[0]


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    wanted = expected.float()
    return (actual.float() - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
