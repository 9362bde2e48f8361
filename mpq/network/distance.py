"""Distance to the float model's output: the objective of models without predictions, such as encoders.

The gradient of a distance vanishes at the float model, so calibration targets are drawn from a normal distribution
around each output, whose negative log-likelihood is the squared distance. Squared gradients then estimate
Gauss-Newton's curvature, as metrics need. Evaluation targets are the outputs themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, evaluating, seeded_normal

TARGET, UNIT = "target:", "unit:"  # prefixes of outputs' names in a batch: targets, and mean squares by sample


def output_parts(output: Any) -> dict[str, Tensor]:
    """Outputs that are compared, by name: floating-point tensors whose first dimension is the samples.

    Similarities between the samples of a batch are left out.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        named = dict(output)
    elif is_dataclass(output):
        named = {field.name: getattr(output, field.name) for field in fields(output)}
    else:
        named = {str(index): part for index, part in enumerate(output if isinstance(output, (tuple, list)) else ())}
    return {
        name: part
        for name, part in named.items()
        if isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 1
        and not name.startswith("logits_per") and name != "loss"
    }  # fmt: skip


@torch.no_grad()
def with_targets(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, noise: bool, seed: int = 0
) -> tuple[Batch, ...]:
    """The batches (mappings of keyword arguments) with the model's outputs added as targets of `distance_loss`.

    Args:
        model: the float model.
        batches: the first dimension of every tensor is the samples.
        noise: draw targets around the outputs, for calibration; without it they are the outputs, for evaluation.
        seed: of the draws.

    Raises:
        MpqError: a model without floating-point outputs.
    """
    targeted = []
    with evaluating(model):
        for index, batch in enumerate(batches):
            parts = output_parts(model(**batch))
            if not parts:
                raise MpqError(f"{type(model).__name__} has no floating-point output to compare: give a loss function")
            extra: dict[str, Tensor] = {}
            for name, part in parts.items():
                unit = part.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
                drawn = seeded_normal(part.shape, seed, "targets", index, name).to(part.device)
                extra[TARGET + name] = part.float() + (drawn * (unit / 2).sqrt() if noise else 0)
                extra[UNIT + name] = unit.expand(len(part)).clone()
            targeted.append({**batch, **extra})
    return tuple(targeted)


def distance_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared distance to the targets over their mean square, summed over a sample's outputs; mean over samples.

    Positions that an "attention_mask" (samples, positions) hides do not count.
    """
    sums = torch.stack([parts.sum(1) for parts, _ in _squares(model, batch)])
    return sums.sum(0).mean()


def relative_distance(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """`distance_loss` of each sample, and the number of outputs compared; both (samples,)."""
    squares = _squares(model, batch)
    sums, counts = ([pair[index].sum(1) for pair in squares] for index in (0, 1))
    return torch.stack(sums).sum(0), torch.stack(counts).sum(0)


def _squares(model: nn.Module, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """For each output, squared differences in units of its mean square, and weights; both (samples, elements)."""
    inputs = {name: part for name, part in batch.items() if not name.startswith((TARGET, UNIT))}
    parts = output_parts(model(**inputs))
    mask = inputs.get("attention_mask")
    squares = []
    for name, part in parts.items():
        target = batch[TARGET + name]
        unit = batch[UNIT + name].reshape(-1, *[1] * (part.ndim - 1))
        counts = torch.ones_like(target)
        if mask is not None and mask.ndim == 2 and part.ndim == 3 and mask.shape == part.shape[:2]:
            counts = counts * (mask != 0).unsqueeze(-1)
        squares.append((((part.float() - target).square() / unit * counts).flatten(1), counts.flatten(1)))
    return squares
