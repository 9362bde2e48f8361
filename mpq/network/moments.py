"""Second moments of the layers' inputs, E[x x^T]: what output errors and GPTQ need to know of the data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, evaluating
from mpq.network.layers import input_matrix
from mpq.network.parallel import gathered, share, total

STRIP = 256  # columns


def second_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> dict[str, Tensor]:
    """Mean of x x^T over samples and positions, by layer name: float32 (cols, cols), or (conv groups, cols, cols).

    `forward(model, batch)` runs the model; its result is not used. A weight shared by an embedding and a linear layer
    gets the linear layer's inputs; an embedding alone, and a layer that no batch reaches, is left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    widths: dict[str, int] = {}

    def collect(name: str, module: nn.Module, inputs: Tensor) -> None:
        matrix = input_matrix(module, inputs.detach()).float()
        product = half_gram(matrix)
        sums[name] = sums[name].add_(product) if name in sums else product
        counts[name] = counts.get(name, 0) + matrix.shape[-2]
        widths[name] = matrix.shape[-1]

    with torch.no_grad(), evaluating(model), watching(model, layers, collect):
        for batch in share(batches):
            forward(model, batch)
    sums = total(sums)
    rows = total({name: torch.tensor(count) for name, count in counts.items()})
    widths = gathered(widths)
    return {name: whole_gram(sums.pop(name), widths[name]).div_(max(int(rows[name]), 1)) for name in list(sums)}


def half_gram(matrix: Tensor) -> Tensor:
    """x^T x of (..., rows, cols), of which only the strips up to the diagonal are computed and kept: (..., kept)."""
    ends = range(STRIP, matrix.shape[-1] + STRIP, STRIP)
    return torch.cat([(matrix[..., end - STRIP : end].mT @ matrix[..., :end]).flatten(-2) for end in ends], -1)


def whole_gram(half: Tensor, cols: int) -> Tensor:
    """(..., cols, cols) of what `half_gram` keeps, or of a sum of such."""
    whole = half.new_empty((*half.shape[:-1], cols, cols))
    read = 0
    for start in range(0, cols, STRIP):
        end = min(start + STRIP, cols)
        strip = half[..., read : read + (end - start) * end].reshape(*half.shape[:-1], end - start, end)
        whole[..., start:end, :end] = strip
        whole[..., :end, start:end] = strip.mT
        read += (end - start) * end
    return whole


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
