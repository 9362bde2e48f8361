"""The library pyhessian as a backend: power iteration and Hutchinson's trace, one run for each layer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import samples_in
from mpq.sensitivity.graph import differentiable_twice, only_gradients_of
from mpq.sensitivity.task import Task


def pyhessian_eigenvalues(task: Task, *, max_steps: int = 100, tolerance: float = 1e-3) -> Iterator[list[float]]:
    """The eigenvalue of largest magnitude of every layer's block by pyhessian's power iteration; its residual; 0.

    It stops when two estimates differ by less than `tolerance` of one, and normalizes by an absolute epsilon of 1e-6,
    which shrinks small eigenvalues; the reported residual is that tolerance times the value, and the number of products
    is unknown.
    """
    for layer in task.track(task.layers, "pyhessian"):
        with reference(task, [task.module(layer).weight]) as run:  # type: ignore[list-item]
            value = run.eigenvalues(maxIter=max_steps, tol=tolerance)[0][0]
        yield [value, tolerance * abs(value), 0.0]


def pyhessian_draws(task: Task, weights: Sequence[Tensor], probes: int) -> list[float]:
    """Hutchinson's estimates of the trace over these weights together, one per draw."""
    with reference(task, weights) as run:
        draws: list[float] = run.trace(maxIter=probes, tol=-math.inf)  # its stopping rule stops at any negative mean
    return draws


class _Losses(nn.Module):
    """The losses of a task's batches as a model of their indices: pyhessian then needs no other criterion."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.measured, self.task = task.model, task

    def forward(self, indices: Tensor) -> Tensor:
        """Loss of the batch whose index fills `indices` (samples,)."""
        return self.task.loss_fn(self.measured, self.task.batches[int(indices[0])])


@contextmanager
def reference(task: Task, weights: Sequence[Tensor]) -> Iterator[Any]:
    """pyhessian's object for these weights on all batches; gradients and the random state are put back afterwards."""
    try:
        import pyhessian
    except ImportError as error:
        raise MpqError("this backend needs the package pyhessian: pip install pyhessian") from error
    loader = [(torch.full((samples_in(batch),), i), torch.zeros(())) for i, batch in enumerate(task.batches)]
    kept = [(parameter, parameter.grad) for parameter in task.model.parameters()]
    try:
        with only_gradients_of(task.model, weights), differentiable_twice(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)  # inside the fork only: pyhessian uses the global generator
            yield pyhessian.hessian(_Losses(task), lambda loss, _: loss, dataloader=loader, cuda=False)
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
