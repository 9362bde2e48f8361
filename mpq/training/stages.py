"""HAWQ's staged fine-tuning (arXiv 1905.03696): quantize the most sensitive layers first, train, then the next."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.training.fake import FakeQuantization


def fine_tuning_order(table: SensitivityTable, allocation: Allocation) -> tuple[str, ...]:
    """The layers by descending predicted loss increase in their schemes.

    With scores lambda_i * ||Q(W_i) - W_i||^2, of top eigenvalues, that is HAWQ's order.

    Raises:
        MpqError: a layer or scheme that is not in the table.
    """
    rows = {layer.name: row for row, layer in enumerate(table.layers)}
    scores = {}
    for layer, scheme in zip(allocation.layers, allocation.schemes, strict=True):
        if layer.name not in rows or scheme not in table.schemes:
            raise MpqError(f"the table has no score of {layer.name} in {scheme}: profile it to order the fine-tuning")
        scores[layer.name] = float(table.scores[rows[layer.name], table.schemes.index(scheme)])
    return tuple(sorted(scores, key=lambda name: -scores[name]))


def stages(order: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """Split the layers into `count` runs of nearly equal length.

    >>> stages(("a", "b", "c", "d", "e"), 2)
    (('a', 'b', 'c'), ('d', 'e'))
    """
    if not 1 <= count <= len(order):
        raise MpqError(f"{len(order)} layers can be fine-tuned in 1 to {len(order)} stages, not {count}")
    ends = [-(-len(order) * stage // count) for stage in range(count + 1)]
    return tuple(tuple(order[start:end]) for start, end in pairwise(ends))


def quantize_in_stages(
    quantization: FakeQuantization, allocation: Allocation, runs: Sequence[Sequence[str]]
) -> Iterator[Mapping[str, str]]:
    """Iterate over stages: each quantizes one more run of layers; train in the loop's body.

    Yields:
        The schemes, by layer name, of the layers quantized so far.
    """
    schemes = allocation.scheme_of
    done: list[str] = []
    for run in runs:
        done += run
        quantization.use({name: schemes[name] for name in done})
        yield {name: schemes[name].name for name in done}
