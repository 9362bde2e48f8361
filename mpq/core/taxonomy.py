"""Kinds of mixed precision, in the terms of a survey (arXiv 2510.16805).

Weights are "mixed" when the layers have several formats, "uniform" when they have one quantized format, "float" when
none is quantized; activations likewise. A float format beside quantized ones counts as one more precision: W-{int4,
bf16} is a mix of two.
"""

from dataclasses import dataclass

from mpq.core.allocation import Allocation


@dataclass(frozen=True)
class Precision:
    """An allocation's place in the taxonomy."""

    label: str  # "MPW", "MPW+UPA", "MPW+MPA", "uniform" or "float"
    weights: str  # "mixed", "uniform" or "float"
    activations: str  # "mixed", "uniform" or "float"
    cache: str = "float"  # keys and values: "mixed", "uniform" or "float"

    def __str__(self) -> str:
        return self.label if self.cache == "float" else f"{self.label}, {self.cache} cache"


def classify(allocation: Allocation) -> Precision:
    """Label an allocation: MPW (mixed weights, activations in floating point), MPW+UPA (uniform activations), MPW+MPA
    (mixed activations), or "uniform", which the survey does not count as mixed: one weight format, whatever the
    activations have. "float" when nothing at all is quantized.
    """
    schemes = [*allocation.scheme_of.values()]
    formats = [format for s in schemes for format in s.weight.members]
    weights = _variety({one.name for one in formats}, {one.name for one in formats if one.is_float_copy})
    activations = _variety(
        {"float" if s.activation is None else s.activation.name for s in schemes},
        {"float" if s.activation is None else s.activation.name for s in schemes if s.activation is None}
        | {s.activation.name for s in schemes if s.activation is not None and s.activation.is_float_copy},
    )
    if weights == "mixed":
        label = {"float": "MPW", "uniform": "MPW+UPA", "mixed": "MPW+MPA"}[activations]
    else:
        label = "float" if weights == activations == "float" else "uniform"
    cached = [] if allocation.cache is None else [*allocation.cache.format_of.values()]
    floats = {one.name for one in cached if one.is_float_copy}
    return Precision(label, weights, activations, _variety({one.name for one in cached}, floats))


def _variety(names: set[str], floats: set[str]) -> str:
    if names == floats:
        return "float"
    return "mixed" if len(names) > 1 else "uniform"
