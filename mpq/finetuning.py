"""Fine-tuning under an allocation: a simulated copy trained against the float model, kept only where it is better."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, NotFiniteError
from mpq.network.calibration import Batch, LossFn, careful, check_batches, evaluating
from mpq.network.parallel import processes
from mpq.network.prepare import prepared
from mpq.network.samples import Arrangement, arrangement
from mpq.quantized import Moments, WeightRounding, simulate
from mpq.rounding.store import Rounder, rounder_of
from mpq.sensitivity.eigenvalue import fine_tuning_order
from mpq.sensitivity.learning_rate import learning_rate
from mpq.training.loop import Trained, train
from mpq.training.objective import harms
from mpq.training.settings import Finetuning
from mpq.training.stages import stages

HELD_OUT = 10  # one batch or sample of this many is kept for acceptance if none are given


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned simulation, in evaluation mode; `mpq.export` writes its numbers as they are."""

    model: nn.Module
    losses: tuple[float, ...]  # the objective at each step, on training data
    lr: float  # weights' learning rate, given or found
    momentum: float  # SGD's momentum; Adam's first decay
    before: float  # harm of the start on acceptance data: KL from the float model, or the loss
    after: float  # harm after training; NaN if it diverged
    error: float  # standard error of the difference, over samples
    kept: bool  # whether `model` is the trained one; otherwise it is the start
    established: bool = True  # measured on data that nothing was trained on
    note: str = ""

    def verdict(self) -> str:
        """One sentence: what fine-tuning changed on acceptance data."""
        caveat = "" if self.established else " Not established on unseen data: there was none to spare."
        if not math.isfinite(self.after):
            return f"Fine-tuning stopped ({self.note}): the start is kept.{caveat}"
        harm = f"harm on acceptance data from {self.before:.4g} to {self.after:.4g} (+- {self.error:.1g})"
        ending = "" if self.kept else ": no improvement, the start is kept"
        return f"{len(self.losses)} steps of fine-tuning (lr {self.lr:.2g}) took the {harm}{ending}.{caveat}"


def finetune(
    model: nn.Module,
    allocation: Allocation,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    settings: Finetuning | None = None,
    *,
    acceptance: Iterable[Batch] | None = None,
    method: str | Rounder = "mse",
    second_moments: Moments | None = None,
    teacher: nn.Module | None = None,
    order: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train a model in an allocation's formats: quantization-aware, distilled from the float model.

    If the trained model is not better on acceptance data, the model before training is returned. Under
    `torchrun`, or where a process group exists, all processes call this together and share every batch.

    Args:
        model: the float model, or one whose weights training starts from; left as it is.
        allocation: layers and schemes.
        batches: training data.
        loss_fn: calls a model on a batch and gives its mean loss, as in `mpq.profile`.
        settings: steps, rates and objective (`mpq.Finetuning`).
        acceptance: data that only compares the result with the start; left out, a tenth of the batches or samples.
        method: first rounding, by name or as a rounder, with the `second_moments` that it may need.
        teacher: the float model, where `model` is not.
        order: in which layers are quantized, where `settings` have several stages; left out, HAWQ's
            (`mpq.sensitivity.eigenvalue.fine_tuning_order`) on the first batches.
        checkpoint: a file from which an interrupted training resumes; removed when it is finished.
        progress: show steps, loss and time left.

    Raises:
        MpqError: what `mpq.simulate` refuses, data that are empty or NaN, or a checkpoint of another training.
    """
    settings, model = settings or Finetuning(), prepared(model)
    loss_fn = careful(loss_fn)
    teacher = model if teacher is None else prepared(teacher)
    data = check_batches(batches)
    arranged = arrangement(teacher, data, loss_fn)
    unseen: tuple[Batch, ...] = ()
    established = True
    if acceptance is not None:
        unseen = check_batches(acceptance)
    else:
        data, unseen = _held_out(data, arranged)
        established = bool(unseen)
    unseen = unseen or data
    rounder = rounder_of(method, second_moments)
    runs = _runs(model, allocation, data, loss_fn, rounder, settings, order)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    student = simulate(model, allocation, rounder, learned=settings.learned).float()
    path = None if checkpoint is None else Path(checkpoint)
    with processes(str(next(student.parameters()).device)), evaluating(teacher):
        start = copy.deepcopy(student.state_dict())
        before, note = harms(student.eval(), teacher, unseen, loss_fn, settings.objective, arranged), ""
        trained = Trained((), math.nan, math.nan)
        after = torch.full_like(before, math.nan)
        try:
            trained = train(
                student, teacher, data, loss_fn, settings, arranged=arranged,
                runs=runs, find_rate=partial(_find_rate, student, settings),
                checkpoint=path, progress=progress,
            )  # fmt: skip
            after = harms(student, teacher, unseen, loss_fn, settings.objective, arranged)
        except NotFiniteError as error:
            note = str(error)
    kept = bool(after.mean() < before.mean())
    if not kept:
        student.load_state_dict(start)
    _restore_types(student.eval(), types)
    if path is not None:
        path.unlink(missing_ok=True)
    difference = after - before
    deviation = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else math.nan
    harm = (float(before.mean()), float(after.mean()), deviation)
    return Finetuned(student, trained.losses, trained.lr, trained.momentum, *harm, kept, established, note)


def _held_out(data: tuple[Batch, ...], arranged: Arrangement) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Training data, and a tenth of it for acceptance: the last batches, or samples of a single batch; none of one."""
    if len(data) > 1:
        held = max(1, len(data) // HELD_OUT)
        return data[:-held], data[-held:]
    samples = arranged.count(data[0])
    cut = samples - max(1, samples // HELD_OUT)
    if not cut:
        return data, ()
    return (arranged.take(data[0], slice(0, cut)),), (arranged.take(data[0], slice(cut, samples)),)


def _find_rate(student: nn.Module, settings: Finetuning, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
    """The rate of the student's weights; batch statistics are left as they were."""
    weights = [one for name, one in student.named_parameters() if one.requires_grad and not name.endswith(".shift")]
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    rate = learning_rate(losses, weights, optimizer=settings.optimizer, seed=settings.seed)
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[name])
    return rate.lr, rate.momentum


def _runs(
    model: nn.Module, allocation: Allocation, data: Sequence[Batch], loss_fn: LossFn, rounder: Rounder,
    settings: Finetuning, order: Sequence[str] | None,
) -> tuple[tuple[str, ...], ...]:  # fmt: skip
    if settings.stages == 1:
        return ()
    if order is None:
        order = fine_tuning_order(model, allocation, data, loss_fn, rounder, seed=settings.seed)
    names = [layer.name for layer in allocation.layers]
    if sorted(order) != sorted(names):
        raise MpqError(f"invalid order of {len(order)} layers: expected each of the allocation's {len(names)} once")
    return stages(order, settings.stages)


@torch.no_grad()
def _restore_types(student: nn.Module, types: dict[str, torch.dtype]) -> None:
    """Parameters in the model's own types; weights are put on their grid first, so that no code changes."""
    for name, module in list(student.named_modules()):
        if name.endswith(".parametrizations.weight"):
            rounding, original = module[-1], module.original
            assert isinstance(rounding, WeightRounding)
            assert isinstance(original, Tensor)
            original.copy_(rounding(original))
    for name, parameter in student.named_parameters():
        own = types.get(name.replace(".parametrizations.weight.original", ".weight"))
        if own is not None and parameter.dtype != own:
            parameter.data = parameter.data.to(own)
