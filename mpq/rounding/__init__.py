"""How codes are chosen: one method, one file. A method takes a weight (rows, cols), a format and, where the layer's
inputs are known, their second moment sum(x x^T), (cols, cols) or (conv groups, cols, cols).
"""

from collections.abc import Callable

from torch import Tensor

from mpq.core.errors import MpqError, nearest_names
from mpq.core.formats import Format
from mpq.rounding.clip_search import clip_search
from mpq.rounding.gptq import gptq
from mpq.rounding.reference import Quantized, quantize

Method = Callable[[Tensor, Format, Tensor | None], Quantized]


def nearest(weight: Tensor, format: Format, second_moment: Tensor | None = None) -> Quantized:
    """Round to nearest with scales from the largest magnitude; the second moment is not used."""
    return quantize(weight, format)


METHODS: dict[str, Method] = {"nearest": nearest, "mse": clip_search, "gptq": gptq}
NEEDS_SECOND_MOMENT = frozenset({"gptq"})


def method_named(name: str) -> Method:
    """The rounding method called `name`; MpqError with the known names when there is none."""
    if name not in METHODS:
        raise MpqError(f"unknown rounding method {name!r}: {nearest_names(name, METHODS)}")
    return METHODS[name]
