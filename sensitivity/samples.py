"""The check of metrics that take samples one by one: independent samples."""

import torch

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, samples_in, take
from mpq.network.samples import ends_with, run_loss, turned
from mpq.sensitivity.task import Task


@torch.no_grad()
def check_independent(task: Task, batch: Batch, index: int) -> None:
    """MpqError when batch `index` cannot be split: its last sample alone has other outputs than among the others.

    This is so if samples are compared with each other. A model without visible outputs is not checked.
    """
    count = samples_in(batch)
    whole, alone = (run_loss(task.model, part, task.loss_fn)[1] for part in (batch, take(batch, [count - 1])))
    same = all(
        ends_with(together, single, count) or (task.second and ends_with(turned(together), turned(single), count))
        for together, single in zip(whole, alone, strict=False)
    )
    if task.together or not same:
        raise MpqError(
            f"the samples of calibration batch {index} depend on each other, but this metric needs independent ones: "
            "take a metric of whole batches, 'loss' or 'hessian'"
        )
