"""Products of a batch's curvature with vectors: the loss's Hessian, or Gauss-Newton's part of it, from one graph."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mpq.core.errors import MpqError, nearest_names
from mpq.network.calibration import check_gradient, check_loss, outputs_of
from mpq.sensitivity.graph import differentiable_twice, only_gradients_of
from mpq.sensitivity.task import Task


class Hessian:
    """Second derivatives of a loss in some tensors of its graph: v -> d(gradient . v) / d(variables)."""

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
        self.variables = list(variables)
        self.gradients = _gradients(loss, variables, create_graph=True)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v, one tensor for each variable."""
        return _pull(self.gradients, self.variables, vectors)

    def block(self, index: int, vector: Tensor) -> Tensor:
        """H_ii v of one variable alone: the graph is walked from its gradient to itself, no further."""
        return _pull([self.gradients[index]], [self.variables[index]], [vector])[0]


class GaussNewton:
    """J^T B J, with J the derivatives of the model's outputs and B the loss's Hessian in the outputs.

    For losses convex in the outputs it is positive semidefinite; for cross-entropy it is the Fisher information. It
    leaves out the outputs' own curvature, and equals the Hessian where the network fits its data. The product J v comes
    from two backward passes: the pullback u -> J^T u is linear, so differentiating it by u in direction v gives J v.
    """

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
        if not outputs:
            raise MpqError("Gauss-Newton's curvature needs a loss function that calls the model and uses its logits")
        self.variables, self.outputs = list(variables), list(outputs)
        self.slopes = _gradients(loss, outputs, create_graph=True)
        self.seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        self.pulled = _gradients(outputs, variables, self.seeds, create_graph=True)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G v, one tensor for each variable."""
        return self._product(self.pulled, self.variables, vectors)

    def block(self, index: int, vector: Tensor) -> Tensor:
        """G_ii v of one variable alone."""
        return self._product([self.pulled[index]], [self.variables[index]], [vector])[0]

    def _product(self, pulled: list[Tensor], variables: list[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        pushed = _pull(pulled, self.seeds, vectors)
        return _pull(self.outputs, variables, _pull(self.slopes, self.outputs, pushed))


Curvature = Hessian | GaussNewton
OPERATORS: Mapping[str, Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Curvature]] = {
    "hessian": Hessian,
    "gauss-newton": GaussNewton,
}


@contextmanager
def weight_curvature(task: Task, index: int, operator: str = "hessian") -> Iterator[tuple[Curvature, list[int]]]:
    """The curvature of batch `index`'s loss per sample in the layers' weights; each variable's layer, 0, 1, 2, ...

    Raises:
        MpqError: an unknown operator, a NaN loss, or an operation that cannot be differentiated twice.
    """
    curvature = operator_named(operator)
    weights: list[Tensor] = [task.module(layer).weight for layer in task.layers]  # type: ignore[misc]
    with only_gradients_of(task.model, weights), differentiable_twice(), outputs_of(task.model) as outputs:
        loss = check_gradient(check_loss(task.loss_fn(task.model, task.batches[index]), index))
        yield curvature(loss, outputs, weights), list(range(len(weights)))


def operator_named(name: str) -> Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Curvature]:
    """The kind of curvature of this name; MpqError with the known names when there is none."""
    if name not in OPERATORS:
        raise MpqError(f"unknown curvature {name!r}: {nearest_names(name, OPERATORS)}")
    return OPERATORS[name]


def _gradients(
    outputs: Tensor | Sequence[Tensor],
    variables: Iterable[Tensor],
    vectors: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Derivatives, zeros where there is no path."""
    gradients = torch.autograd.grad(
        outputs, list(variables), vectors,
        create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return list(gradients)


def _pull(outputs: Sequence[Tensor], variables: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """vectors^T d(outputs) / d(variables); outputs that do not depend on anything count as constant."""
    pairs = zip(outputs, vectors, strict=True)
    used = [(output, vector.to(output.dtype)) for output, vector in pairs if output.requires_grad]
    if not used:
        return [torch.zeros_like(variable) for variable in variables]
    return _gradients([output for output, _ in used], variables, [vector for _, vector in used])
