"""Second moments of the layers' inputs, E[x x^T]: what output errors and GPTQ need to know of the data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, counted_positions, evaluating
from mpq.network.layers import input_matrix
from mpq.network.parallel import gathered, share, total
from mpq.network.uses import seeing_uses

STRIP = 256  # columns


def second_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> dict[str, Tensor]:
    """Mean of x x^T over samples and positions, by layer name: float32 (cols, cols), or (conv groups, cols, cols).

    Positions that a batch's masks or labels hide are left out (`counted_positions`), in layers whose rows are the
    batch's positions.
    `forward(model, batch)` runs the model; its result is not used. A weight shared by an embedding and a linear layer
    gets the linear layer's inputs; an embedding alone, and a layer that no batch reaches, is left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    widths: dict[str, int] = {}
    masks: tuple[Tensor, ...] = ()

    def collect(name: str, module: nn.Module, inputs: Tensor) -> None:
        matrix = counted_rows(input_matrix(module, inputs.detach()), inputs, masks).float()
        if matrix.shape[-2] == 0:
            return
        product = half_gram(matrix)
        sums[name] = sums[name].add_(product) if name in sums else product
        counts[name] = counts.get(name, 0) + matrix.shape[-2]
        widths[name] = matrix.shape[-1]

    with torch.no_grad(), evaluating(model), watching(model, layers, collect):
        for batch in share(batches):
            masks = counted_positions(batch)
            forward(model, batch)
    sums = total(sums)
    rows = total({name: torch.tensor(count) for name, count in counts.items()})
    widths = gathered(widths)
    return {name: whole_gram(sums.pop(name), widths[name]).div_(max(int(rows[name]), 1)) for name in list(sums)}


def counted_rows(matrix: Tensor, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The rows of a layer's (..., rows, cols) at positions that count; all where no mask (samples, positions) fits.

    A mask fits when the rows are its positions: `inputs` begin with its samples, positions follow or are flattened.
    """
    for mask in masks:
        for shown in (mask, mask.T):  # samples first, or time first
            if len(inputs) in (len(shown), shown.numel()) and matrix.shape[-2] == shown.numel():
                return matrix[..., shown.flatten().to(matrix.device), :]
    return matrix


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
    """Call `see(layer name, module, inputs)` whenever a layer's weight is used inside the block, look-ups aside."""

    def product(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if not isinstance(module, nn.Embedding):
            see(name, module, inputs)

    with seeing_uses(model, layers, product):
        yield
