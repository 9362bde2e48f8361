"""Rounding methods, one a file. A method takes a weight (rows, cols), a format and, where the layer's
inputs are known, their second moment sum(x x^T), (cols, cols) or (conv groups, cols, cols). Plugins add methods through
the entry-point group "mpq.roundings".
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from mpq.core.formats import Format
from mpq.core.registry import Registry, Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from mpq.rounding.reference import Quantized

Method: TypeAlias = "Callable[[Tensor, Format, Tensor | None], Quantized]"

DEFAULT_METHOD = "gptq"  # default of whole jobs; rounding without calibration data takes "mse"
METHODS: Registry[Rounding] = Registry(
    Rounding,
    "rounding method",
    "mpq.roundings",
    [
        Rounding("nearest", "mpq.rounding.nearest:nearest", "nearest code, scales from the largest magnitude"),
        Rounding("mse", "mpq.rounding.clip_search:clip_search", "nearest code, scales of least squared error"),
        Rounding(
            "gptq",
            "mpq.rounding.gptq:gptq",
            "least squared error of the layer's output (GPTQ): the default",
            second_moment=True,
        ),
    ],
)


def method_named(name: str) -> Method:
    """The rounding method of this name, built in or a plugin's; MpqError with the known names otherwise."""
    return METHODS.named(name).load()
