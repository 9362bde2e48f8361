"""Round to nearest."""

from torch import Tensor

from mpq.core.formats import Format
from mpq.rounding.reference import Quantized, quantize


def nearest(weight: Tensor, format: Format, second_moment: Tensor | None = None) -> Quantized:
    """Round to nearest with scales from the largest magnitude; the second moment is not used."""
    return quantize(weight, format)
