"""Rounding to a mix: each row is taken from the weight rounded in the row's format."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpq.core.formats import Format
from mpq.core.mix import Mix
from mpq.rounding import Method
from mpq.rounding.reference import Quantized, no_codes


def mixed(mix: Mix, wholes: Sequence[Quantized]) -> Quantized:
    """The rows that the mix's assignment takes from the same weight in each of its formats.

    Raises:
        MpqError: the mix has no assignment, or one of another shape.
    """
    shape = wholes[0].shape
    places = torch.from_numpy(mix.assigned(*shape))
    rows = [(places == place).nonzero().flatten() for place in range(len(wholes))]
    parts = tuple(take_rows(whole, own) for whole, own in zip(wholes, rows, strict=True) if len(own))
    return Quantized(mix, shape, no_codes(wholes[0].codes), parts=parts)


def in_format(method: Method, weight: Tensor, format: Format, second_moment: Tensor | None = None) -> Quantized:
    """The weight (rows, cols) rounded by a method, in one format or in a mix."""
    if isinstance(format, Mix):
        return mixed(format, [method(weight, one, second_moment) for one in format.formats])
    return method(weight, format, second_moment)


def take_rows(quantized: Quantized, rows: Tensor) -> Quantized:  # rows: int64 (n,)
    """Some rows of a matrix in a format whose rows are independent."""
    rows = rows.to(quantized.codes.device)
    taken = replace(quantized, shape=(len(rows), quantized.shape[1]), codes=quantized.codes[rows])
    return taken.map_tables(lambda _, table: table[rows])
