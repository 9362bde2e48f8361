"""Second moments of the layers' inputs, E[x x^T], for output errors and GPTQ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.core.layer import Layer
from mpq.network.calibration import Batch, LossFn, counted_positions, evaluating
from mpq.network.experts import routing
from mpq.network.layers import input_matrix
from mpq.network.parallel import gathered, share, total
from mpq.network.storage import release_memory
from mpq.network.uses import seeing_uses

STRIP = 256  # columns


def second_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> dict[str, Tensor]:
    """Mean of x x^T over samples and positions, by layer name: float32 (cols, cols), or (conv groups, cols, cols).

    Hidden positions (`counted_positions`) are left out in layers whose rows are the batch's positions, or
    are those routed to an expert.
    `forward(model, batch)` runs the model; its result is ignored. A weight shared by an embedding and a linear layer
    gets the linear layer's inputs; other embeddings and layers without inputs are left out.
    """
    return dict(moments_in_turn(model, layers, batches, forward))


def moments_in_turn(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], forward: LossFn
) -> Iterator[tuple[str, Tensor]]:
    """Names and moments of `second_moments`, one whole matrix in memory at a time beside the halves that are summed."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    widths: dict[str, int] = {}
    masks: tuple[Tensor, ...] = ()

    def collect(name: str, module: nn.Module, inputs: Tensor) -> None:
        matrix = counted_rows(input_matrix(module, inputs.detach()), inputs, masks, routed.get(module)).float()
        if matrix.shape[-2] == 0:
            return
        product = half_gram(matrix)
        sums[name] = sums[name].add_(product) if name in sums else product
        counts[name] = counts.get(name, 0) + matrix.shape[-2]
        widths[name] = matrix.shape[-1]

    with torch.no_grad(), evaluating(model), routing(model) as routed, watching(model, layers, collect):
        for batch in share(batches):
            masks = counted_positions(batch)
            forward(model, batch)
            release_memory()
    sums = total(sums)
    rows = total({name: torch.tensor(count) for name, count in counts.items()})
    widths = gathered(widths)
    for name in list(sums):
        yield name, whole_gram(sums.pop(name), widths[name]).div_(max(int(rows[name]), 1))


def counted_rows(
    matrix: Tensor, inputs: Tensor, masks: Sequence[Tensor], routed: tuple[int, Tensor] | None = None
) -> Tensor:
    """The counted rows of a layer's (..., rows, cols); all rows where no mask (samples, positions) fits.

    A mask fits when `inputs` begin with its samples, followed by or flattened with its positions, or are some of
    them: `routed` gives the number of all and the places of these (`mpq.network.experts.routing`).
    """
    for mask in masks:
        if routed is not None and mask.numel() == routed[0]:
            return matrix[..., mask.flatten().to(matrix.device)[routed[1].to(matrix.device)], :]
        for shown in (mask, mask.T):  # samples first, or time first
            if len(inputs) in (len(shown), shown.numel()) and matrix.shape[-2] == shown.numel():
                return matrix[..., shown.flatten().to(matrix.device), :]
    return matrix


def half_gram(matrix: Tensor) -> Tensor:
    """x^T x of (..., rows, cols), only the strips up to the diagonal: (..., stored elements)."""
    ends = range(STRIP, matrix.shape[-1] + STRIP, STRIP)
    return torch.cat([(matrix[..., end - STRIP : end].mT @ matrix[..., :end]).flatten(-2) for end in ends], -1)


def whole_gram(half: Tensor, cols: int) -> Tensor:
    """The full (..., cols, cols) of a result, or sum of results, of `half_gram`."""
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
    """Call `see(layer name, module, inputs)` at each use of a layer's weight inside the block, except look-ups."""

    def product(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if not isinstance(module, nn.Embedding):
            see(name, module, inputs)

    with seeing_uses(model, layers, product):
        yield
