"""Writing an allocation with any exporter, whose further inputs are gathered from the source."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpq.core.allocation import Allocation
from mpq.core.formats import Format
from mpq.core.registry import Entry, Target
from mpq.exporters.caches import check_cache
from mpq.exporters.holding import check, check_model
from mpq.exporters.mpq import checkpoint
from mpq.exporters.request import ExportRequest
from mpq.exporters.targets import TARGETS
from mpq.measuring import store_for
from mpq.network.calibration import Batch, tensors_in
from mpq.network.prepare import prepared
from mpq.network.ranges import Ranges, input_ranges
from mpq.network.samples import arrangement
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
    """Write an allocation with the exporter called `name`; returns the written path.

    Calibration data are used to trace graphs and for static activation scales. The method is a name, or a rounder that
    caches rounded layers.
    """
    target = TARGETS.named(name)
    check(target, allocation)
    check_cache(target, allocation)
    source = replace(source, model=prepared(source.model))
    check_model(target, source.model)
    few = few_samples(source, CHECKED)
    with TemporaryDirectory() as own:
        request = ExportRequest(
            source.model,
            allocation,
            folder,
            method=store_for(method, source, allocation.layers) if isinstance(method, str) else method,
            recipe=source.recipe or None,
            inputs=tensors_in(few)[0] if "inputs" in target.reads else None,
            run=lambda model: source.loss_fn(model, few),
            ranges=ranges_for(source, allocation) if "ranges" in target.reads else None,
            tokenizer=source.tokenizer,
            side_files=source.side_files or _tokenizer_files(source.tokenizer, Path(own)),
        )
        written: Path = target.load()(request)
    return written


def sizer_for(target: Target, source: Source) -> Callable[[Allocation], int]:
    """A function from an allocation to the bytes of the target's weight files, without rounding anything.

    Exact where one file holds them: model.safetensors, model.gguf with its vocabulary, model.onnx; other texts of the
    folder do not count. An allocation that the target cannot hold counts as in our own checkpoint.
    """
    model = prepared(source.model)
    own = partial(checkpoint.file_size, model)
    if not target.sizer:
        return own
    inputs = tensors_in(few_samples(source, CHECKED))[0] if "inputs" in target.reads else None
    sized: Callable[[Allocation], int] = Entry(target.name, target.sizer)(model, source.tokenizer, inputs)

    def size(allocation: Allocation) -> int:
        held = not any(target.refusal(layer, allocation.scheme_of[layer.name]) for layer in allocation.layers)
        return sized(allocation) if held else own(allocation)

    return size


def _tokenizer_files(tokenizer: Any, folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that has none, such as one read from a GGUF file."""
    if not hasattr(tokenizer, "save_pretrained"):
        return ()
    tokenizer.save_pretrained(folder)
    return tuple(sorted(path for path in folder.iterdir() if path.is_file()))


def few_samples(source: Source, count: int) -> Batch:
    """The first samples of the calibration data, or its first batch where that cannot be cut."""
    return arrangement(source.model, source.calibration, source.loss_fn).take(source.calibration[0], slice(0, count))
