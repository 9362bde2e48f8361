"""Oracle metrics: the measured change when one layer at a time takes each scheme."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.network.calibration import check_loss, samples_in
from mpq.network.calls import call_input, with_call_input
from mpq.network.layers import matrix_to_weight
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.task import Scores, Task, by_layer

ByBatch: TypeAlias = NDArray[np.float64]  # (batches,), a mean over each batch's samples


def loss(task: Task) -> Scores:
    """Measured change of the mean loss per sample, for every layer and scheme; it can be negative.

    Costs one forward pass over all batches for each pair. The standard error is that of the paired differences over
    batches, 0 with a single batch. Weights are restored bit for bit, also after an error. Other figures, such as an
    error rate, are measured by passing them as the loss function.
    """
    return measured(task, lambda: batch_losses(task))


def measured(task: Task, measure: Callable[[], ByBatch]) -> Scores:
    """Change of the mean of `measure()` when one layer at a time takes each scheme."""
    shares = batch_shares(task)
    reference = measure()

    def row(layer: Layer) -> list[float]:
        numbers: list[float] = []
        for scheme in task.schemes:
            with in_scheme(task, layer, scheme):
                try:
                    differences = measure() - reference
                except MpqError as error:
                    raise MpqError(f"layer {layer.name} in {scheme.name}: {error}") from error
            numbers += mean_and_error(differences, shares)
        return numbers

    return by_layer(task, row, "measuring")


def batch_losses(task: Task) -> ByBatch:
    """The loss of every batch, without gradients."""
    with torch.no_grad():
        losses = [check_loss(task.loss_fn(task.model, batch), index).item() for index, batch in enumerate(task.batches)]
    return np.array(losses)


def batch_shares(task: Task) -> ByBatch:
    """Each batch's share of all samples."""
    sizes = np.array([samples_in(batch) for batch in task.batches], dtype=np.float64)
    shares: ByBatch = sizes / sizes.sum()
    return shares


def mean_and_error(differences: ByBatch, shares: ByBatch) -> tuple[float, float]:
    """Mean over batches and its standard error, 0 with a single batch."""
    mean = float(shares @ differences)
    count = len(differences)
    if count == 1:
        return mean, 0.0
    return mean, float(np.sqrt(shares**2 @ (differences - mean) ** 2 * count / (count - 1)))


@contextmanager
def in_scheme(task: Task, layer: Layer, scheme: Scheme) -> Iterator[None]:
    """Inside the block the layer has this scheme's rounded weight, and inputs in its activation format if any.

    An embedding's inputs are indices: it takes the weight format alone.
    """
    matrix = task.quantized(layer, scheme)  # first, since it may run the model for its inputs
    with ExitStack() as stack:
        if scheme.activation is not None:
            for name in layer.names:
                user = task.model.get_submodule(name)
                if not isinstance(user, nn.Embedding):
                    stack.callback(
                        user.register_forward_pre_hook(_quantizer(scheme.activation), with_kwargs=True).remove
                    )
        stack.enter_context(with_weight(task, layer, matrix))
        yield


@contextmanager
def with_weight(task: Task, layer: Layer, matrix: Tensor) -> Iterator[None]:
    """Inside the block the layer's weight is this matrix (rows, cols); afterwards it is restored bit for bit."""
    module = task.module(layer)
    weight: Tensor = module.weight  # type: ignore[assignment]
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(matrix_to_weight(matrix, module))
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)


def _quantizer(format: Format) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rounded = fake_quantize_inputs(module, call_input(args, kwargs), format)
        return with_call_input(args, kwargs, rounded)

    return hook
