"""Writing an allocation by any exporter: what each of them asks for beside the model, gathered from the source."""

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.exporters import exporter_named
from mpq.exporters.caches import check_cache
from mpq.exporters.holding import check
from mpq.exporters.targets import TARGETS
from mpq.measuring import store_for
from mpq.network.calibration import take, tensors_in
from mpq.network.experts import has_experts
from mpq.network.prepare import prepared
from mpq.network.ranges import Ranges, input_ranges
from mpq.rounding import DEFAULT_METHOD
from mpq.rounding.store import Rounder
from mpq.sources import Source

CHECKED = 2  # calibration samples on which the exported model is compared with the simulated one


def ranges_for(source: Source, allocation: Allocation) -> Ranges | None:
    """Ranges of the inputs that are rounded with one scale for the tensor, None where there are none."""
    layers = [layer for layer in allocation.layers if _has_one_scale(allocation.scheme_of[layer.name].activation)]
    return input_ranges(source.model, layers, source.calibration, source.loss_fn) if layers else None


def _has_one_scale(activation: Format | None) -> bool:
    return activation is not None and activation.granularity == "tensor"


def export_to(
    name: str,
    source: Source,
    allocation: Allocation,
    folder: str | os.PathLike[str],
    method: str | Rounder = DEFAULT_METHOD,
) -> Path:
    """Write an allocation by the exporter called `name`; what was written.

    Graphs are traced with calibration data, of which static activation scales come too. The method is a name, or a
    rounder that holds what was rounded already.
    """
    export = exporter_named(name)
    check(TARGETS.named(name), allocation)
    check_cache(TARGETS.named(name), allocation)
    source = replace(source, model=prepared(source.model))
    refuse_experts(name, source.model)
    settings: dict[str, Any] = {"method": method, "recipe": source.recipe or None}
    if isinstance(method, str):
        settings["method"] = store_for(method, source, allocation.layers)
    if "inputs" in inspect.signature(export).parameters:
        settings["inputs"] = _compared_on(source) if name == "mpq" else tensors_in(source.calibration[0])[0][:2]
    if "ranges" in inspect.signature(export).parameters:
        settings["ranges"] = ranges_for(source, allocation)
    if "tokenizer" in inspect.signature(export).parameters:
        settings["tokenizer"] = source.tokenizer
    with TemporaryDirectory() as own:
        if "side_files" in inspect.signature(export).parameters:
            settings["side_files"] = source.side_files or _tokenizer_files(source.tokenizer, Path(own))
        written: Path = export(source.model, allocation, folder, **settings)
    return written


def _tokenizer_files(tokenizer: Any, folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that came without any, as out of a GGUF file."""
    if not hasattr(tokenizer, "save_pretrained"):
        return ()
    tokenizer.save_pretrained(folder)
    return tuple(sorted(path for path in folder.iterdir() if path.is_file()))


def _compared_on(source: Source) -> Callable[[nn.Module], Any]:
    """Runs a model on the first samples of the calibration data."""
    batch = take(source.calibration[0], slice(0, CHECKED))
    return lambda model: source.loss_fn(model, batch)


def refuse_experts(name: str, model: nn.Module) -> None:
    """MpqError when a file for others than us would have to hold experts that were taken apart."""
    if name != "mpq" and has_experts(model):
        raise MpqError(f"experts are written for mpq alone, not for {name}: leave --for and --to at mpq")
