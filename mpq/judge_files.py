"""`mpq judge MODEL --config FILE`: allocations of other tools compared with ours of the same size."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq.acceptance import Candidate, accept, candidate_of
from mpq.comparison import Measured
from mpq.core.allocation import KIND, Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import DEFAULT_FORMATS
from mpq.core.layer import Layer
from mpq.core.reading import reading
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.evaluation import Quality
from mpq.exporters.configurations import TOOLS, read_configuration, tool_named, tool_of
from mpq.exporters.gguf.reader import tensor_types
from mpq.exporters.holding import Holder, restrict
from mpq.exporters.targets import TARGETS
from mpq.measuring import Measurer, store_for
from mpq.network.layers import find_layers
from mpq.network.prepare import prepared
from mpq.network.storage import other_bytes, state_bytes
from mpq.rounding import DEFAULT_METHOD
from mpq.search import frontier_of
from mpq.sensitivity import DEFAULT_METRIC
from mpq.sensitivity.profile import profile
from mpq.sources import Source


@dataclass(frozen=True, eq=False)
class Contestant:
    """An allocation that a file describes, and the target that supports it."""

    name: str
    holder: Holder
    allocation: Allocation


def read_contestant(file: str, layers: Sequence[Layer]) -> Contestant:
    """The allocation that a file describes: one of another quantizer (`mpq.exporters.configurations`, "TOOL=FILE" where
    it is not recognized), config.json of a quantized checkpoint, a GGUF file, or an allocation of ours.

    Raises:
        MpqError: no such file, or one that describes none of the layers.
    """
    name, equals, path = file.partition("=")
    named, path = (name, path) if equals and name in TOOLS else ("", file)
    if path.endswith(".gguf"):
        lines = (f"^{re.escape(tensor)}$={kind}" for tensor, kind in tensor_types(Path(path)).items())
        return _described("llama-quantize", file, "\n".join(lines), layers)
    with reading(path, "configuration", "name a configuration file"):
        text = Path(path).read_text(encoding="utf-8")
    if not named and (own := _own(text)) is not None:
        return Contestant(file, TARGETS["mpq"], _matched(own, layers))
    return _described(named or tool_of(text), file, text, layers)


def _described(tool: str, file: str, text: str, layers: Sequence[Layer]) -> Contestant:
    return Contestant(file, tool_named(tool), read_configuration(tool, text, layers))


def _own(text: str) -> Allocation | None:
    try:
        values = json.loads(text)
        return Allocation.from_json(values) if values["kind"] == KIND else None
    except (ValueError, KeyError, TypeError):
        return None


def _matched(own: Allocation, layers: Sequence[Layer]) -> Allocation:
    """The allocation for these layers; layers that it does not list are bf16."""
    schemes = own.scheme_of
    if not schemes.keys() & {layer.name for layer in layers}:
        raise MpqError(f"this allocation has none of the layers {layers[0].name}, ...: is it for this model?")
    return Allocation(tuple(layers), tuple(str(schemes.get(layer.name, "bf16")) for layer in layers))


def judge_files(
    source: Source,
    files: Sequence[str],
    *,
    table: SensitivityTable | None = None,
    formats: Sequence[str] | None = None,
    metric: str = DEFAULT_METRIC,
    method: str = DEFAULT_METHOD,
    effort: str = "fast",
    seed: int = 0,
    progress: bool = True,
) -> tuple[Measured, ...]:
    """Compare allocations of other tools, each with one of ours that the same tool supports and that is no larger.

    All are rounded by the same method, so that allocations are compared, not quantizers; quality is on evaluation data.

    Args:
        source: model and data.
        files: as `read_contestant` takes them.
        table: losses of the files' formats and others; left out, the model is profiled.
        formats: candidates for ours, besides those in the files; left out, those of `mpq profile`.
        metric: sensitivity metric of the profile.
        method: rounding method.
        effort: how much is measured before ours is chosen (`mpq.acceptance.accept`).
        seed: of all random numbers.
        progress: show progress bars.

    Returns:
        The original, then for each file its own allocation and ours.

    Raises:
        MpqError: a file that cannot be read, or does not fit the model.
    """
    source = replace(source, model=prepared(source.model))
    table = None if table is None else table.weights()
    layers = table.layers if table else find_layers(source.model)
    contestants = [read_contestant(file, layers) for file in files]
    store = store_for(method, source, layers)
    if table is None:
        held = [name for one in contestants for name in one.allocation.schemes]
        names = dict.fromkeys(parse_scheme(name).name for name in (*(formats or DEFAULT_FORMATS), *held))
        table = profile(
            source.model, source.calibration, source.loss_fn, list(names), metric=metric, method=store, seed=seed,
            progress=progress, provenance=source.provenance(),
        )  # fmt: skip
    overhead = other_bytes(source.model, table.layers)
    measurer = Measurer(source, store, progress)
    reference = measurer.reference("evaluation").quality
    rows = [Measured("original", None, state_bytes(source.model), reference, 0.0, 0.0)]

    def measured(name: str, allocation: Allocation, means: Mapping[str, Any]) -> Measured:
        allocation = replace(allocation, overhead=overhead)
        quality: Quality = measurer.quality(allocation, "evaluation", means)
        return Measured(name, allocation, allocation.total, quality, *quality.loss_above(reference))

    for one in contestants:
        theirs = predicted(one.allocation, table)
        candidate = candidate_of(one.name, theirs, measurer)  # its means corrected where that helps, as ours
        rows.append(measured(one.name, theirs, candidate.means if candidate else {}))
        held_table = restrict(table, one.holder)
        frontier = frontier_of(held_table.table, forbid=held_table.forbid, ties=one.holder.fuses)
        best: Candidate = accept(frontier, theirs.size, measurer, effort=effort, seed=seed).chosen
        rows.append(measured(f"ours for {one.holder.name}", best.allocation, best.means))
    return tuple(rows)


def predicted(allocation: Allocation, table: SensitivityTable) -> Allocation:
    """The allocation with the table's prediction, none where the table lacks a scheme."""
    columns = {name: index for index, name in enumerate(table.schemes)}
    try:
        picked = [(i, columns[name]) for i, name in enumerate(allocation.schemes)]
    except KeyError:
        return allocation
    loss = float(sum(table.scores[pair] for pair in picked))
    error = float(sum(table.errors[pair] ** 2 for pair in picked) ** 0.5)
    return replace(allocation, loss=loss, error=error, metric=table.metric)
