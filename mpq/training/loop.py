"""The loop of quantization-aware fine-tuning: a simulated student, the float model as its teacher."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpq.core.errors import NotFiniteError
from mpq.network.calibration import Batch, LossFn, evaluating, seeded, tensors_in
from mpq.network.fingerprint import fingerprint
from mpq.network.parallel import rank_and_count, total
from mpq.network.samples import SAMPLES_FIRST, Arrangement
from mpq.training.batchnorm import freeze_batchnorm
from mpq.training.checkpoint import resume, save
from mpq.training.objective import objective_loss
from mpq.training.settings import Finetuning
from mpq.training.stages import quantize_only


@dataclass(frozen=True)
class Trained:
    """Result of training."""

    losses: tuple[float, ...]  # the objective at every step
    lr: float  # largest, of weights
    momentum: float


FindRate = Callable[[Sequence[Callable[[], Tensor]]], tuple[float, float]]  # losses of steps -> lr and momentum
SAMPLED = 8  # steps' losses that a rate is found from


def train(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    settings: Finetuning,
    *,
    arranged: Arrangement = SAMPLES_FIRST,
    runs: Sequence[Sequence[str]] = (),
    find_rate: FindRate | None = None,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> Trained:
    """Train the student in place.

    Data come in a new random order each time round. Inside `mpq.network.parallel.processes()` each process takes its
    share of every batch and gradients are summed, so that losses equal those of one process up to rounding and batch
    statistics, which each process computes on its share.

    Args:
        student: simulated and trainable.
        teacher: the float model; left as it is.
        batches: training data.
        loss_fn: calls a model on a batch; its value counts for the objective's task.
        settings: steps, rates, optimizer and objective.
        arranged: where samples lie in the batches.
        runs: of layers, each quantized only when those before it have been trained for their share of the steps
            (`mpq.training.stages`); all at once by default. The rate falls to zero in every stage.
        find_rate: finds the rate and momentum where the settings leave them at "auto", from functions that give the
            objective on the data of the first steps.
        checkpoint: a file that is written every `save_every` steps; if it exists, training resumes from it, with the
            same result as without an interruption.
        progress: show steps, loss and time left.

    Raises:
        NotFiniteError: a loss that is NaN or infinite.
        MpqError: a checkpoint of another training.
    """
    optimizer = _optimizer(student, settings)
    identity = {**_identity(student, batches, settings), "order": str([list(run) for run in runs])}
    losses = resume(checkpoint, identity, student, optimizer)
    order = _steps(batches, settings)
    for _ in losses:
        next(order)
    with ExitStack() as stack:
        stack.enter_context(evaluating(teacher))
        student.train()
        if settings.freeze_batchnorm:
            for handle in freeze_batchnorm(student):
                stack.callback(handle.remove)
        bar = stack.enter_context(
            tqdm(
                total=settings.steps, initial=len(losses), desc="fine-tuning", disable=None if progress else True,
                leave=False,
            )
        )  # fmt: skip
        stack.callback(quantize_only, student, None)
        if settings.lr == "auto" and not losses:
            assert find_rate is not None
            _use(optimizer, *find_rate(_first_losses(student, teacher, batches, loss_fn, settings)), settings)
        for step in range(len(losses), settings.steps):
            stage = step * max(len(runs), 1) // settings.steps
            quantize_only(student, [name for run in runs[: stage + 1] for name in run] if runs else None)
            _set_rates(optimizer, step, settings.steps, max(len(runs), 1))
            losses.append(_step(student, teacher, next(order), loss_fn, settings, optimizer, step, arranged))
            bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
            bar.update()
            if checkpoint is not None and (step + 1) % settings.save_every == 0 and rank_and_count()[0] == 0:
                save(checkpoint, identity, student, optimizer, losses)
    student.eval()
    group = optimizer.param_groups[0]
    return Trained(tuple(losses), group["initial_lr"], group.get("momentum", group.get("betas", (0.0,))[0]))


def _step(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, settings: Finetuning,
    optimizer: torch.optim.Optimizer, step: int, arranged: Arrangement,
) -> float:  # fmt: skip
    optimizer.zero_grad()
    device = next(student.parameters()).device
    summed = torch.zeros((), dtype=torch.float64)
    with _random_numbers_of(settings.seed, step):
        for batch in batches:
            own = _own_part(batch, arranged)
            if own is None:
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                loss = objective_loss(student, teacher, own, loss_fn, settings.objective)
            share = arranged.count(own) / arranged.count(batch) / len(batches)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            summed += loss.item() * share
    value = total({"loss": summed})["loss"].item()
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss of step {step + 1} is {value}: lower lr ({settings.lr})")
    _sum_gradients(student)
    optimizer.step()
    return value


def _use(optimizer: torch.optim.Optimizer, lr: float, momentum: float, settings: Finetuning) -> None:
    """Set the rate and momentum that were found; learned scales keep their own rate under Adam."""
    for group in optimizer.param_groups if settings.optimizer == "sgd" else optimizer.param_groups[:1]:
        group["initial_lr"] = lr
        if settings.optimizer == "sgd":
            group["momentum"] = momentum


def _first_losses(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, settings: Finetuning
) -> list[Callable[[], Tensor]]:
    """Functions that give the objective on the data of the first steps, whole on every process."""
    order = _steps(batches, settings)

    def loss(step: int, data: Sequence[Batch]) -> Tensor:
        with _random_numbers_of(settings.seed, step):
            parts = [objective_loss(student, teacher, batch, loss_fn, settings.objective) for batch in data]
        return torch.stack(parts).mean()

    return [partial(loss, step, next(order)) for step in range(SAMPLED)]


@contextmanager
def _random_numbers_of(seed: int, step: int) -> Iterator[None]:
    """Dropout's random numbers of a step, independent of earlier steps."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(seed, "fine-tuning", step))))
        yield


def _set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, stages: int) -> None:
    """Half a cosine in every stage."""
    stage = step * stages // steps
    start, end = -(-stage * steps // stages), -(-(stage + 1) * steps // stages)
    rate = 0.5 + 0.5 * math.cos(math.pi * (step - start) / (end - start))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate


def _own_part(batch: Batch, arranged: Arrangement) -> Batch | None:
    rank, count = rank_and_count()
    samples = list(range(rank, arranged.count(batch), count))
    return batch if count == 1 else arranged.take(batch, samples) if samples else None


def _sum_gradients(student: nn.Module) -> None:
    if rank_and_count()[1] == 1:
        return
    parameters = dict(student.named_parameters())
    known = {name: one.grad for name, one in parameters.items() if one.grad is not None}
    for name, gradient in total(known).items():
        parameters[name].grad = gradient


def _optimizer(student: nn.Module, settings: Finetuning) -> torch.optim.Optimizer:
    named = [(name, one) for name, one in student.named_parameters() if one.requires_grad]
    scales = [one for name, one in named if name.endswith(".shift")]
    others = [one for name, one in named if not name.endswith(".shift")]
    lr = 0.0 if isinstance(settings.lr, str) else settings.lr  # "auto" is found later
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}]
    if scales:
        groups.append({"params": scales, "lr": lr if settings.optimizer == "sgd" else settings.scale_lr})
    for group in groups:
        group["initial_lr"] = group["lr"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return torch.optim.Adam(groups)


def _steps(batches: Sequence[Batch], settings: Finetuning) -> Iterator[list[Batch]]:
    """The batches of each step; all data in a new random order each time round."""

    def one_by_one() -> Iterator[Batch]:
        generator = seeded(settings.seed, "fine-tuning")
        while True:
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]

    order = one_by_one()
    while True:
        yield [next(order) for _ in range(settings.accumulate)]


def _identity(student: nn.Module, batches: Sequence[Batch], settings: Finetuning) -> dict[str, str]:
    """Settings and data that a resumed training must share."""
    values = {name: str(value) for name, value in asdict(settings).items() if name != "save_every"}
    start = fingerprint(list(student.state_dict().values()))
    return {
        **values,
        "model": start,
        "data": fingerprint([tensor for batch in batches for tensor in tensors_in(batch)]),
    }
