"""The whole job: profile, search, export, reload, measure, report; every artefact a file in one folder."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.acceptance import SAMPLES, STEPS, Acceptance, Candidate, accept, check_effort, with_tuned_scales
from mpq.card import circumstances, write_card
from mpq.comparison import Measured, along, compare, on_other_text, sentences
from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.files import write_atomically
from mpq.core.frontier import Frontier
from mpq.core.latency import LatencyTable
from mpq.core.live_activations import LiveActivations
from mpq.core.registry import Target
from mpq.core.sizes import parse_size
from mpq.core.table import SensitivityTable
from mpq.exporters.folder import refuse_foreign
from mpq.exporters.holding import Held, restrict
from mpq.exporters.mpq import checkpoint
from mpq.exporters.targets import TARGETS
from mpq.exporting import export_to
from mpq.feasible import Wanted
from mpq.forecast import forecast
from mpq.measuring import Measurer, store_for
from mpq.memory import Request, Serving, choose_cache
from mpq.network.batchnorm import with_means
from mpq.network.copies import copied
from mpq.network.prepare import prepared
from mpq.network.storage import release_memory, state_bytes
from mpq.planning import Limits, Plan, layer_budget, planned
from mpq.plots import Point, Prediction, draw_frontier, frontier_facts
from mpq.report import Row, write_report
from mpq.rounding import DEFAULT_METHOD
from mpq.search import frontier_of
from mpq.sensitivity import DEFAULT_METRIC
from mpq.sensitivity.profile import profile
from mpq.smallest import smallest, within_limit
from mpq.sources import Source
from mpq.tokens import in_words, tokens_beside, tokens_table
from mpq.training.tuned_scales import Tuning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Result of `quantize_model`."""

    folder: Path
    table: SensitivityTable = field(repr=False)
    frontier: Frontier = field(repr=False)
    allocation: Allocation
    measured: tuple[Measured, ...] = field(repr=False)  # the original, uniform formats, the packed model last
    accepted: Acceptance = field(repr=False)
    points: Mapping[int, Candidate] = field(repr=False)  # points of the frontier by index, measured on acceptance data
    seconds: float  # duration of the job
    max_kl: float | None = None  # the requested limit
    elsewhere: str = ""  # quality on text of another kind
    serving: Serving | None = None  # the requested memory or bits of the cache
    activations: LiveActivations | None = field(default=None, repr=False)  # None where they cannot be counted

    def words(self) -> tuple[str, ...]:
        """The measurements, in sentences."""
        live = [] if self.activations is None else [self.activations.sentence(self.allocation.scheme_of)]
        lines = (
            self.accepted.verdict(), *self.accepted.corrections(), *live, *sentences(self.measured, self.accepted)
        )  # fmt: skip
        lines = (*lines, *filter(None, [self.elsewhere]))
        if self.serving is not None:
            lines = (*in_words(self.allocation, self.serving, self.measured[-1].size), *lines)
        if self.max_kl is None:
            return lines
        return (within_limit(self.max_kl, self.accepted.chosen.harm(), self.measured[-1].harm[0]), *lines)

    def tokens(self) -> list[tuple[str, ...]]:
        """A heading and points of the frontier with the tokens that fit the memory; empty without one."""
        if self.serving is None or self.serving.memory is None:
            return []
        return tokens_table(self.frontier, self.serving)

    def rows(self) -> list[Row]:
        """The before/after table."""
        return [measured.row(chosen=measured is self.measured[-1]) for measured in self.measured]


def quantize_model(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    bits: float | None = None,
    size: float | str | None = None,
    max_kl: float | None = None,
    memory: float | str | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_bits: float | None = None,
    kv_formats: Sequence[str] | None = None,
    budgets: Mapping[str, float] | None = None,
    latencies: LatencyTable | None = None,
    formats: Sequence[str] | None = None,
    target: str = "mpq",
    metric: str = DEFAULT_METRIC,
    metric_options: Mapping[str, Any] | None = None,
    method: str = DEFAULT_METHOD,
    table: SensitivityTable | None = None,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    pin: Mapping[str, str] | None = None,
    ties: bool = True,
    granularity: str | None = None,
    effort: str = "normal",
    tuning_steps: int | None = None,
    ram: float | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """Profile, search, export, load back and measure; writes the model, table, frontier, plot and report to `folder`.

    Args:
        source: model and data.
        folder: made when missing; an interrupted profile in it is resumed.
        bits: maximum average of stored bits per weight, or
        size: maximum bytes of the file that the target writes, or text as "500MB", or
        max_kl: maximum measured KL divergence from the original, nats per prediction: finds the smallest model.
        memory: maximum bytes of weights and cached keys and values together, or text as "6GB", with `context` tokens of
            each of `batch` texts cached; alone or with `bits` or `size`.
        context: tokens of a text, for the cache and for activations; left out, with `kv_bits` alone, all that the model
            takes, and for activations those of a sample.
        batch: number of texts cached at once.
        kv_bits: maximum average of stored bits of a cached element, with any other budget, or alone with unchanged
            weights.
        kv_formats: candidates of keys and values (`mpq.core.cache`); by default those that the target supports.
        budgets: largest totals of other costs beside those: "bitops" of a sample, "latency" in seconds of `latencies`,
            "activations" in bytes that are live at once in a pass over `batch` texts of `context` tokens, or `batch`
            other samples (`mpq.network.live_activations`).
        latencies: measured seconds of layers (`mpq bench`) for `batch` tokens, and of attention to the context if it
            was measured.
        formats: candidate schemes; by default of 2 to 8 bits (`mpq.core.formats`), or those that the target supports.
        target: program that will run the model (`mpq.exporters.targets`): layers get only schemes that it supports, and
            the folder is one that it can open.
        metric: sensitivity metric.
        metric_options: the metric's own keyword arguments.
        method: rounding method, for profile and export alike.
        table: an existing table, instead of profiling.
        include: patterns of the layers to quantize.
        exclude: patterns of layers to leave unquantized.
        pin: scheme by layer pattern.
        ties: whether fused layers share a scheme.
        granularity: "layer", or "row" for mixes of formats within a layer (`mpq.sensitivity.profile.profile`), which is
            reduced to "layer" for targets without mixes. The default is "row" for language models, if the target, the
            metric and `latencies` support it: there rows reduce the divergence by a fifth or more at the same bytes,
            while image networks gain only at the smallest sizes.
        effort: how much is measured before choosing: "fast", "normal" or "best" (`mpq.acceptance.accept`).
        tuning_steps: of tuning the chosen allocation's scales against the original (`mpq.training.tuned_scales`); by
            default 0, 60 or 200 by effort.
        ram: maximum bytes that the job itself may use, or text as "8GB": one that is forecast to need more is refused.
            Without it, such a job is only warned about, where the system has less memory free.
        seed: of all random numbers.
        progress: show progress bars.

    Raises:
        MpqError: invalid options, or a budget that cannot be met.
    """
    started = time.monotonic()
    check_effort(effort)
    folder = Path(folder)
    wanted = Wanted(
        bits, size, max_kl, memory, context, batch, kv_bits, kv_formats, formats, metric, include, exclude, pin, ties,
        table,
    )  # fmt: skip
    refuse_foreign(folder, checkpoint.FILES)
    source = replace(source, model=prepared(source.model))
    plan = planned(source, TARGETS.named(target), wanted, budgets or {}, latencies, granularity)
    steps = STEPS[effort] if tuning_steps is None else tuning_steps
    tuning = Tuning(steps, SAMPLES.get(source.kind, Tuning.samples), seed=seed)
    expected = forecast(source, plan.layers, 0 if table else len(plan.formats), method, effort, tuning)
    expected.announce(None if ram is None else parse_size(ram), progress)
    store = store_for(method, source, plan.layers)
    if table is None:
        table = profile(
            source.model, source.calibration, source.loss_fn, plan.formats, metric=metric, method=store,
            include=include, exclude=exclude, seed=seed, progress=progress, resume=folder / "table.csv.unfinished",
            options=metric_options, granularity=plan.granularity, cache=plan.cached, provenance=source.provenance(),
        )  # fmt: skip
    release_memory()
    held = restrict(table, plan.target)
    measurer = Measurer(source, store, progress)
    cache, limits = _with_cache(plan, held, measurer, wanted, effort)
    frontier, budget = _searched(held, limits, plan.sized, cache, pin, ties or held.fuses)
    table.save(folder / "table.csv")

    def finish(size: float) -> Acceptance:
        fits = partial(limits.hold, plan.sized)
        accepted = accept(frontier, size, measurer, effort=effort, seed=seed, fits=fits)
        release_memory()
        return with_tuned_scales(accepted, measurer, tuning)

    accepted = finish(budget) if max_kl is None else smallest(frontier, max_kl, measurer, finish)
    allocation, rounder = accepted.chosen.allocation, accepted.chosen.rounder or measurer.store
    corrected = replace(source, model=with_means(source.model, accepted.chosen.means))
    export_to(target, corrected, allocation, folder, rounder)
    packed = _packed(source, folder) if plan.target.name == "mpq" else None
    measured = compare(measurer, frontier, accepted, packed, state_bytes(source.model), plan.sized)
    elsewhere = on_other_text(measurer, accepted, packed) if effort != "fast" else ""
    points = along(frontier, allocation, measurer) if source.kind != "loss" and effort != "fast" else {}
    outcome = Outcome(
        folder, table, frontier, allocation, measured, accepted, points, time.monotonic() - started, max_kl, elsewhere,
        plan.serving, plan.live,
    )  # fmt: skip
    _write_artefacts(outcome, source, plan.target)
    return outcome


def _with_cache(
    plan: Plan, held: Held, measurer: Measurer, wanted: Wanted, effort: str
) -> tuple[CacheFormats | None, Limits]:
    """The chosen formats of keys and values, and the limits that they leave to the weights."""
    limits = plan.limits
    if plan.serving is None:
        return None, limits
    most = limits.most(sum(layer.params for layer in plan.layers))
    request = Request(
        measurer.source.model, plan.serving, plan.target, wanted.pin, wanted.ties, most, limits.budgets
    )  # fmt: skip
    cache = choose_cache(held, request, measurer, measured=effort != "fast")
    return cache, limits.beside(cache, plan.serving)


def _searched(
    held: Held,
    limits: Limits,
    sized: Callable[[Allocation], int],
    cache: CacheFormats | None,
    pin: Mapping[str, str] | None,
    ties: bool,
) -> tuple[Frontier, float]:
    """The frontier within the limits, and the maximum bytes of its layers, infinite for a limit of divergence."""
    frontier = frontier_of(held.table, pin=pin, forbid=held.forbid, ties=ties, cache=cache)
    if limits.max_kl is not None:
        return frontier, math.inf
    budget = layer_budget(frontier, sized, limits.bits, limits.size)
    if not limits.budgets:
        return frontier, budget
    table = held.table.weights()
    further = limits.budgets.beside(table, cache)
    frontier = frontier_of(
        table, search="integer", pin=pin, forbid=held.forbid, ties=ties, cache=cache,
        costs=further["costs"], budgets={**further["budgets"], "size": budget},
    )  # fmt: skip
    return frontier, budget


def _packed(source: Source, folder: Path) -> nn.Module:
    device = next((parameter.device for parameter in source.model.parameters()), torch.device("cpu"))
    own = None if source.recipe else copied(source.model)
    return checkpoint.load(folder, model=own, device=device, trust=True)  # only the factory that built the source


def _write_artefacts(outcome: Outcome, source: Source, target: Target) -> None:
    harms = {index: candidate.harm_with_error() for index, candidate in outcome.points.items()}
    serving = outcome.serving
    counted = {} if serving is None or serving.memory is None else {"tokens": partial(tokens_beside, serving=serving)}
    outcome.frontier.save(outcome.folder / "frontier.csv", divergences=harms, columns=counted)
    measured = [*outcome.points.values(), *outcome.accepted.candidates]
    points = [
        Point(one.name, one.allocation.bits, *one.harm_with_error())
        for one in measured
        if one.quality.divergence is not None
    ]
    figure = draw_frontier(
        frontier_facts({"searched frontier": outcome.frontier}, {"chosen": outcome.allocation}, points), source.name
    )
    with write_atomically(outcome.folder / "frontier.png") as draft:
        figure.savefig(draft, dpi=150)
    compared = [one for one in outcome.measured if one.allocation is not None]
    predictions = [
        Prediction(one.name, one.allocation.loss, *one.harm)
        for one in compared
        if one.allocation is not None and not math.isnan(one.allocation.loss)
    ]
    title = f"{source.name} at {outcome.allocation.bits:.2f} bits per weight"
    settings = circumstances(source.model, outcome.seconds)
    write_report(
        outcome.folder / "report.html", title=title,
        table=outcome.table, frontier=outcome.frontier, allocation=outcome.allocation, rows=outcome.rows(),
        predictions=predictions, words=outcome.words(), points=points, tokens=outcome.tokens(),
        settings=settings,
    )  # fmt: skip
    write_card(
        outcome.folder, title=title, target=target, rows=outcome.rows(), words=outcome.words(), settings=settings,
        cache=outcome.allocation.cache,
    )  # fmt: skip
