"""Second moments of the layers' inputs, E[x x^T]: what output errors and GPTQ need to know of the data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.core.calibration import Batch, LossFn, evaluating
from mpq.core.layer import Layer
from mpq.core.layers import input_matrix
from mpq.core.parallel import share, total


def second_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> dict[str, Tensor]:
    """Mean of x x^T over samples and positions, by layer name: float32 (cols, cols), or (conv groups, cols, cols).

    `forward(model, batch)` runs the model; its result is not used. A weight shared by an embedding and a linear layer
    gets the linear layer's inputs; an embedding alone, and a layer that no batch reaches, is left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collect(name: str, module: nn.Module, inputs: Tensor) -> None:
        matrix = input_matrix(module, inputs.detach()).float()
        product = matrix.mT @ matrix
        sums[name] = sums[name] + product if name in sums else product
        counts[name] = counts.get(name, 0) + matrix.shape[-2]

    with torch.no_grad(), evaluating(model), watching(model, layers, collect):
        for batch in share(batches):
            forward(model, batch)
    sums = total(sums)
    rows = total({name: torch.tensor(count) for name, count in counts.items()})
    return {name: moment / max(int(rows[name]), 1) for name, moment in sums.items()}


@contextmanager
def watching(
    model: nn.Module, layers: Sequence[Layer], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call `see(layer name, module, inputs)` whenever a layer's module runs inside the block, embeddings aside."""
    owners = {model.get_submodule(name): layer.name for layer in layers for name in layer.names}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(owners[module], module, args[0])

    handles = [module.register_forward_pre_hook(hook) for module in owners if not isinstance(module, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
