"""One function from a model, data and candidate schemes to the sensitivity table."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from mpq.core.cache import cache_name, parse_cache_format
from mpq.core.errors import MpqError, expect, first_line, nearest_names
from mpq.core.formats import DEFAULT_FORMATS
from mpq.core.layer import Layer
from mpq.core.registry import Entry, Metric
from mpq.core.scheme import Scheme, parse_scheme
from mpq.core.table import SensitivityTable
from mpq.network.cached import find_cached
from mpq.network.calibration import (
    Batch,
    LossFn,
    check_batches,
    evaluating,
    first_batches,
    mean_loss,
    samples_in,
    take,
    tensors_in,
)
from mpq.network.coverage import coverage
from mpq.network.fingerprint import fingerprint, model_fingerprint
from mpq.network.layers import find_layers
from mpq.network.macs import count_all_macs
from mpq.network.offload import offloaded
from mpq.network.prepare import prepared
from mpq.network.samples import arranged
from mpq.network.storage import other_bytes
from mpq.rounding import METHODS
from mpq.rounding.store import MethodRounder, Rounder, moments_needed
from mpq.sensitivity import DEFAULT_METRIC, METRICS, check_granularity
from mpq.sensitivity.cached import cache_scores
from mpq.sensitivity.evidence import flat_loss, reaching, without_evidence
from mpq.sensitivity.journal import Journal, check_settings
from mpq.sensitivity.rows import Mixed, ladder
from mpq.sensitivity.task import Scores, Task

REFERENCE = 32  # samples of the recorded loss, by which a resumed run detects another loss function


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    formats: Sequence[str | Scheme] = DEFAULT_FORMATS,
    *,
    metric: str = DEFAULT_METRIC,
    method: str | Rounder = "mse",
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    offload: str | None = None,
    granularity: str = "layer",
    cache: Sequence[str] = (),
) -> SensitivityTable:
    """Predict the loss increase of every layer in every scheme.

    The model is measured in evaluation mode and left unchanged, bit for bit. No copy of it is made, unless it computes
    its weights (`mpq.network.prepare`). A layer without evidence, because no sample or no gradient reaches it or
    other weights leave a measured loss as it is, has NaN scores, with the reason in the table's `reasons`.

    Args:
        model: any module with Linear, Conv1d, Conv2d, Embedding or transformers' Conv1D layers.
        batches: calibration data, as `loss_fn` takes it.
        loss_fn: `loss_fn(model, batch)`, the batch's mean loss per sample.
        formats: candidates, by name ("int4-g128", "int8-channel+a:int8-token") or as Scheme.
        metric: a name of `mpq.sensitivity.METRICS` or of a plugin.
        method: the rounding method, a name of `mpq.rounding.METHODS`, or a rounder, such as a store that caches rounded
            layers.
        include: patterns of the layers to score (globs, or "re:" and a regular expression).
        exclude: patterns of layers to leave out.
        seed: of all random numbers; the same seed gives the same table.
        progress: show progress bars.
        resume: a file of finished measurements, from which an interrupted run with the same settings resumes, with the
            same table as an uninterrupted one. It is removed when the table is complete.
        options: keyword arguments of the metric.
        provenance: what to record in the table beside the settings ("model", "dataset", ...).
        offload: a device on which the model does not fit: weights stay where they are and are copied to it one module
            at a time, twice for each backward pass. Batches must be on it. Not for metrics of second derivatives.
        granularity: "layer", or "row": mixes of formats by rows are scored too (`mpq.sensitivity.rows`), at several
            sizes for each family of formats that differ in width alone. The metric must score by row.
        cache: formats of cached keys and values (`mpq.core.cache`), which are then entries of the table too, scored by
            `mpq.sensitivity.cached.cache_scores` with any metric.

    Raises:
        MpqError: empty or NaN data (naming the batch), no layers, unknown names, a score that is NaN or infinite
            (naming the layer), or a `resume` file of other settings.
    """
    model, batches = prepared(model), check_batches(batches)
    scheme_tuple = _distinct(formats)
    scorer, rounding = _scorer(metric, options or {}, offload), _known(method)
    check_granularity(granularity, metric)
    layers = find_layers(model, include, exclude)
    cache_formats = tuple(dict.fromkeys(parse_cache_format(name) for name in cache))
    entries = find_cached(model, take(batches[0], slice(0, 1)), loss_fn) if cache else ()
    scoring = {"metric": metric, "options": dict(options or {}), "method": rounding, "seed": seed}
    settings = {
        **scoring, "schemes": tuple(scheme.name for scheme in scheme_tuple), "layers": [layer.name for layer in layers],
        "granularity": granularity, **({"cache": list(map(cache_name, cache_formats))} if cache else {}),
    }  # fmt: skip
    check_settings(resume, settings)
    with evaluating(model), offloaded(model, offload) if offload is not None else nullcontext():
        samples = arranged(model, batches, loss_fn)
        batches, loss_fn = samples.batches, samples.loss_fn
        layers, macs = count_all_macs(model, layers, batches[0], loss_fn)
        covered = coverage(model, layers, macs)
        with reaching(model, layers) as reached:
            reference = mean_loss(model, first_batches(batches, REFERENCE), loss_fn)
        settings |= {
            "weights": model_fingerprint(model), "loss": f"{_name_of(loss_fn)}: {reference:.4g}",
            "data": fingerprint(tensor for batch in batches for tensor in tensors_in(batch)),
        }  # fmt: skip
        rounder = method
        if isinstance(rounder, str):
            rounder = MethodRounder(rounder, dict(moments_needed(rounder, model, layers, batches, loss_fn)))
        journal = Journal(resume, settings)
        flat = not scorer.compares_losses and flat_loss(model, batches[0], loss_fn)
        task = Task(
            model, batches, loss_fn, layers, scheme_tuple, rounder, seed, journal, progress, flat,
            samples.second, samples.together,
        )  # fmt: skip
        mixed = _scored(task, scorer, granularity, options or {})
        _check_finite(layers, scheme_tuple, metric, mixed.scores)
        (scores, errors), reasons = without_evidence(task, mixed.scores, reached, scorer.compares_losses)
        cached = cache_scores(task, entries, cache_formats) if cache else None
    recorded: dict[str, Any] = {
        **scoring, "nsamples": sum(samples_in(batch) for batch in batches), "reference_loss": reference,
        "overhead": other_bytes(model, layers), "coverage": covered.to_json(),
        **({"granularity": granularity} if mixed.assignments else {}), **(provenance or {}),
    }  # fmt: skip
    assignments = {name: own for name, own in mixed.assignments.items() if own and name not in reasons}
    names = tuple(scheme.name for scheme in mixed.schemes)
    table = SensitivityTable(layers, names, scores, errors, metric, recorded, reasons, assignments)
    if cached is not None:
        table = table.with_entries(entries, [Scheme(one, cached=True).name for one in cache_formats], *cached)
    journal.close()
    return table


def _known(method: str | Rounder) -> str:
    """The method's name; MpqError for an unknown one."""
    return METHODS.named(method).name if isinstance(method, str) else method.name


def _scored(task: Task, metric: Metric, granularity: str, options: Mapping[str, Any]) -> Mixed:
    """The metric's scores of all schemes, and of mixes with granularity "row".

    Raises:
        MpqError: autograd refuses the model.
    """
    try:
        if granularity == "layer":
            return Mixed(task.schemes, metric.load()(task, **options), {})
        mixed: Mixed = Entry(metric.name, metric.rows).load()(task, ladder(task.schemes), **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MpqError(
            f"the metric {metric.name} does not work on this model ({first_line(error)}): take 'loss', "
            "which needs no gradients"
        ) from error
    return mixed


def _scorer(name: str, options: Mapping[str, Any], offload: str | None) -> Metric:
    """The metric of this name; MpqError for options that it lacks, or if it does not support offload."""
    metric = METRICS.named(name)
    known = inspect.signature(metric.load()).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        for option in options:
            if option not in list(known)[1:]:
                raise MpqError(
                    f"unknown option {option!r} of the metric {name}: {nearest_names(option, list(known)[1:])}"
                )
    if offload is not None and metric.second_order:
        raise MpqError(
            f"the metric {name} needs second derivatives, which offload does not support: take {DEFAULT_METRIC}"
        )
    return metric


def _distinct(schemes: Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    if isinstance(schemes, str):
        schemes = (schemes,)
    for scheme in schemes:
        expect(scheme, (str, Scheme), "names of formats, such as 'int4-g128'")
    parsed = dict.fromkeys(parse_scheme(scheme) if isinstance(scheme, str) else scheme for scheme in schemes)
    if not parsed:
        raise MpqError("no candidate formats: give at least one, such as int4-g128")
    return tuple(parsed)


def _check_finite(layers: Sequence[Layer], schemes: Sequence[Scheme], metric: str, scores: Scores) -> None:
    for name, values in zip(("score", "standard error"), scores, strict=True):
        for i, j in np.argwhere(~np.isfinite(values[:, : len(schemes)])):
            raise MpqError(f"the {metric} {name} of layer {layers[i].name} in {schemes[j].name} is {values[i, j]}")


def _name_of(function: LossFn) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
