"""Quantization of layers' inputs: rounding errors, and the loss's curvature in the inputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.network.calibration import check_gradient, check_loss, outputs_of, samples_in
from mpq.network.calls import call_input, with_call_input
from mpq.network.moments import watching
from mpq.network.parallel import total
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.graph import differentiable_twice, only_gradients_of
from mpq.sensitivity.products import Curvature, operator_named
from mpq.sensitivity.task import Task


@dataclass(frozen=True)
class InputError:
    """Rounding errors of a layer's inputs a in each activation format."""

    numbers: float  # in one sample's inputs, all calls of the layer together
    squared: Mapping[Format, float]  # mean of ||Q(a) - a||^2 over samples


def input_errors(task: Task) -> dict[str, InputError]:
    """The error of every layer's inputs in the task's activation formats, from one forward pass, by layer name."""
    formats = {scheme.activation for scheme in task.schemes if scheme.activation is not None}
    keys = [(layer.name, format) for layer in task.layers for format in (None, *formats)]
    sums = {key: torch.zeros((), dtype=torch.float64) for key in keys}

    def see(name: str, module: nn.Module, inputs: Tensor) -> None:
        sums[name, None] += inputs.numel()
        for format in formats:
            difference = fake_quantize_inputs(module, inputs, format) - inputs
            sums[name, format] += difference.square().sum(dtype=torch.float64).item()

    with torch.no_grad(), watching(task.model, task.layers, see):
        for index in task.own_batches("input errors"):
            check_loss(task.loss_fn(task.model, task.batches[index]), index)
    samples = sum(samples_in(batch) for batch in task.batches)
    means = {key: added.item() / samples for key, added in total(sums).items()}
    return {
        layer.name: InputError(means[layer.name, None], {format: means[layer.name, format] for format in formats})
        for layer in task.layers
    }


@contextmanager
def input_curvature(task: Task, index: int, operator: str = "hessian") -> Iterator[tuple[Curvature, list[int]]]:
    """The curvature of batch `index`'s loss in what is added to the layers' inputs, embeddings aside.

    Every call of a layer's module has a variable of its own, zeros of the inputs' shape; the list says whose it is.
    The loss is a mean over samples, so v^T H v is the mean of the samples' own v_n^T H_n v_n.
    """
    curvature = operator_named(operator)
    with only_gradients_of(task.model), differentiable_twice(), outputs_of(task.model) as outputs:
        with _shifted_inputs(task.model, task.layers) as (shifts, owners):
            loss = check_gradient(check_loss(task.loss_fn(task.model, task.batches[index]), index))
        yield curvature(loss, outputs, shifts), owners


@contextmanager
def _shifted_inputs(model: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[list[Tensor], list[int]]]:
    shifts: list[Tensor] = []
    owners: list[int] = []
    modules = {model.get_submodule(name): i for i, layer in enumerate(layers) for name in layer.names}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        inputs = call_input(args, kwargs)
        shifts.append(torch.zeros_like(inputs, requires_grad=True))
        owners.append(modules[module])
        return with_call_input(args, kwargs, inputs + shifts[-1])

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in modules
        if not isinstance(module, nn.Embedding)
    ]
    try:
        yield shifts, owners
    finally:
        for handle in handles:
            handle.remove()
