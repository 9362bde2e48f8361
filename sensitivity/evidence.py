"""Evidence for scores: samples that reach a layer, gradients that come back. Without it a score is NaN, not 0."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.network.calibration import Batch, LossFn, logits_of, seeded_normal, with_logits
from mpq.network.parallel import gathered
from mpq.network.uses import seeing_uses
from mpq.rounding.reference import Quantized
from mpq.rounding.store import MethodRounder
from mpq.sensitivity.journal import Journal
from mpq.sensitivity.loss import loss
from mpq.sensitivity.predictions import replaying
from mpq.sensitivity.task import Scores, Task

log = logging.getLogger(__name__)

UNREACHED = "no calibration sample reaches it: its module is never called, or with no rows"
NO_GRADIENT = "no gradient of the loss reaches it: no_grad, detach, argmax or the like follows it"
FLAT = "the loss has no gradient at this model, such as a distance to the model's own outputs"
UNCHANGED = "the loss is the same in every format, and with the weights reversed and negated too"

SHIFT = 1e-3  # change of the outputs, relative to their size
NOISE = 1e-2  # share of the gradient that such a shift causes


@contextmanager
def reaching(model: nn.Module, layers: Sequence[Layer]) -> Iterator[set[str]]:
    """Names of the layers whose weights are used with at least one row inside the block."""
    reached: set[str] = set()

    def see(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if inputs.numel():
            reached.add(name)

    with seeing_uses(model, layers, see):
        yield reached


def without_evidence(task: Task, scores: Scores, reached: set[str], measured: bool) -> tuple[Scores, dict[str, str]]:
    """The scores with NaN where nothing supports them, and the reasons by layer name, which are logged too.

    That is where a layer's scores are all 0 though its weights change. A measured 0 is evidence where a sample reaches
    the layer and weights far from its own change the loss.

    Args:
        task: what was scored.
        scores: of its layers and schemes, and perhaps of mixes after the schemes.
        reached: names of the layers that samples reach.
        measured: whether the scores are differences of losses, not derivatives.

    Raises:
        MpqError: a measured loss that no layer changes.
    """
    reached = set(gathered(dict.fromkeys(reached)))
    values, errors = (numbers.copy() for numbers in scores)
    reasons: dict[str, str] = {}
    for i, layer in enumerate(task.layers):
        own = slice(len(task.schemes))  # mixes are after the schemes and have no separate evidence
        if values[i, own].any() or errors[i, own].any():
            continue
        if not any(bool(task.weight_error(layer, scheme).any()) for scheme in task.schemes):
            continue
        if layer.name not in reached:
            reasons[layer.name] = UNREACHED
        elif not measured:
            reasons[layer.name] = FLAT if task.flat else NO_GRADIENT
        elif not _changes_loss(task, layer):
            reasons[layer.name] = UNCHANGED
        if layer.name in reasons:
            values[i] = errors[i] = np.nan
    if len(reasons) == len(task.layers) and UNCHANGED in reasons.values():
        raise MpqError(
            "no layer's weights change the loss: give more data, or a loss that depends on the model's outputs"
        )
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, other in reasons.items() if other == reason]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        log.warning("%d of %d layers have no score (%s): %s", len(names), len(task.layers), reason, shown)
    return (values, errors), reasons


class _Reversed(MethodRounder):
    """Rounds the negated weight, rows and columns in reverse order: as large as the layer's own, and far from it."""

    def quantized(self, layer: Layer, weight: Tensor, scheme: Scheme) -> Quantized:
        return super().quantized(layer, -weight.flip(0, 1), scheme)


def _changes_loss(task: Task, layer: Layer) -> bool:
    """Whether weights far from the layer's own change the loss at all."""
    far = replace(
        task, layers=(layer,), schemes=(parse_scheme("int8-channel"),), rounder=_Reversed(), journal=Journal(None, {}),
        progress=False,
    )  # fmt: skip
    values, errors = loss(far)
    return bool(values.any() or errors.any())


def flat_loss(model: nn.Module, batch: Batch, loss_fn: LossFn) -> bool:
    """Whether the loss's gradient in the model's outputs is rounding noise: far smaller than after a small shift.

    False for a loss that does not use the outputs or cannot be differentiated.
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.no_grad():
            loss_fn(model, batch)
        handle.remove()
        as_it_is, shifted = (_slope(model, batch, loss_fn, outputs, shift) for shift in (0.0, SHIFT))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # outputs may be of any kind
        return False
    finally:
        handle.remove()
    return as_it_is < NOISE * shifted


def _slope(model: nn.Module, batch: Batch, loss_fn: LossFn, outputs: Sequence[Any], shift: float) -> float:
    """Norm of the loss's gradient in the logits of all calls, shifted at random by so much of their size."""
    logits: list[Tensor] = []
    shifted: list[Any] = []
    for number, output in enumerate(outputs):
        detached = logits_of(output).detach()
        noise = seeded_normal(detached.shape, 0, "shift", number).to(detached.device)
        logits.append((detached + shift * detached.float().square().mean().sqrt() * noise).requires_grad_())
        shifted.append(with_logits(copy.copy(output), logits[-1]))
    with torch.enable_grad(), replaying(model, shifted):
        slopes = torch.autograd.grad(loss_fn(model, batch), logits, materialize_grads=True, allow_unused=True)
    return math.sqrt(sum(slope.double().square().sum().item() for slope in slopes))
