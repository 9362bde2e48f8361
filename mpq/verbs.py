"""Public verbs that take more than one kind of argument: `mpq.quantize`, with its old meaning for one version."""

import os
import warnings
from typing import Any, overload

from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.pipeline import Outcome, quantize_model
from mpq.quantized import simulate
from mpq.sources import Source, open_source


@overload
def quantize(source: Source | str, folder: str | os.PathLike[str], **options: Any) -> Outcome: ...
@overload
def quantize(source: nn.Module, folder: Allocation, *arguments: Any, **options: Any) -> nn.Module: ...
def quantize(
    source: Source | str | nn.Module,
    folder: str | os.PathLike[str] | Allocation | None = None,
    *arguments: Any,
    **options: Any,
) -> Outcome | nn.Module:
    """Do the whole job, as `mpq quantize` does: profile, search, export, load back and measure.

    Args:
        source: a `Source` (model, data and loss) or a name that `open_source` knows, such as "tiny-lm".
        folder: where model, table, frontier, plot and report are written.
        arguments: none; see below.
        options: those of `mpq.pipeline.quantize_model`: `bits` or `size`, `formats`, `target`, `metric`, ...

    The old call `mpq.quantize(model, allocation)`, which gave a simulated copy, warns and calls `mpq.simulate`.

    Raises:
        MpqError: invalid arguments, or what the job refuses.
    """
    allocation = options.get("allocation", folder)
    if isinstance(allocation, Allocation):
        warnings.warn(
            "mpq.quantize(model, allocation) is mpq.simulate(model, allocation) now; this spelling goes in version 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        options.pop("allocation", None)
        return simulate(source, allocation, *arguments, **options)  # type: ignore[arg-type]
    if isinstance(source, nn.Module):
        raise MpqError(
            "mpq.quantize needs data beside the model: give mpq.Source(name, model, calibration, evaluation, loss_fn), "
            "or call mpq.simulate(model, allocation) for a simulated copy"
        )
    if folder is None or arguments:
        raise MpqError("mpq.quantize takes a source, the folder to write, and options by name, such as bits=4.25")
    if isinstance(source, str):
        source = open_source(source)
    return quantize_model(source, folder, **options)  # type: ignore[arg-type]
