"""Measurement of allocations on a model: each layer is rounded once in each format."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, NotFiniteError, nearest_names
from mpq.core.layer import Layer
from mpq.evaluation import Quality, Reference, evaluate
from mpq.network.batchnorm import estimate_means, stored_means
from mpq.network.calibration import Batch, first_batches, samples_in
from mpq.network.layers import find_layers
from mpq.network.shelf import Shelf
from mpq.quantized import quantized_layers
from mpq.rounding import METHODS
from mpq.rounding.store import Finished, Rounder, RoundingStore, moments_needed
from mpq.sources import Source
from mpq.training.tuned_scales import Tuning, tune_scales
from mpq.trial import Trial

log = logging.getLogger(__name__)

HALVES = (torch.float16, torch.bfloat16)
SEARCHED = 0.25  # share of the calibration batches that a search measures on,
SEARCHED_LEAST = {"perplexity": 4}  # but at least so many samples, or 64
SCREENED = 0.25  # share of these on which clearly worse candidates are dropped,
SCREENED_LEAST = 8  # if it has this many samples


def store_for(method: str, source: Source, layers: Sequence[Layer]) -> RoundingStore:
    """A store for a rounding method; the calibration moments it needs are computed at first use."""
    METHODS.named(method)  # exists
    return RoundingStore(
        method, lambda: moments_needed(method, source.model, layers, source.calibration, source.loss_fn)
    )


class Measurer:
    """One simulated copy of a source's model, measured on any part of its data.

    Parts are "search" (some of the calibration data; its beginning is "screening", what is left "rest"), "acceptance"
    (data not used by scores; calibration data if the source has none) and "evaluation".
    """

    def __init__(self, source: Source, store: RoundingStore, progress: bool = False) -> None:
        self.source, self.store, self.progress = source, store, progress
        self.trial = Trial(source.model, self.store)
        self.corrects = bool(stored_means(source.model))
        self._references: dict[str, Reference] = {}
        self._shelf = Shelf()

    def reference(self, part: str) -> Reference:
        """The original model on a part of the data."""
        if part not in self._references:
            source = self.source
            self._references[part] = Reference(
                source.model, self._batches(part), source.kind, source.loss_fn, self.progress, self._shelf
            )
        return self._references[part]

    def _batches(self, part: str) -> tuple[Batch, ...]:
        source = self.source
        parts = {
            "search": self._searched(),
            "screening": self._searched()[: self._screened()],
            "rest": self._searched()[self._screened() :],
            "acceptance": source.acceptance or source.calibration,
            "evaluation": source.evaluation,
            "other": source.other,
        }
        if part not in parts:
            raise MpqError(f"there is no part {part!r} of the data: {nearest_names(part, parts)}")
        return parts[part]

    @property
    def searching(self) -> tuple[str, ...]:
        """The parts of "search" in order; candidates that are clearly worse on the first are not measured on the
        second.
        """
        return ("screening", "rest") if self._screened() else ("search",)

    def _searched(self) -> tuple[Batch, ...]:
        batches = self.source.calibration
        count = max(SEARCHED_LEAST.get(self.source.kind, 64), SEARCHED * sum(map(samples_in, batches)))
        return tuple(first_batches(batches, count))

    def _screened(self) -> int:
        """Batches of "screening"; none if "search" is too small to be split."""
        searched = self._searched()
        screened = first_batches(searched, max(SCREENED_LEAST, SCREENED * sum(map(samples_in, searched))))
        return len(screened) if len(screened) < len(searched) else 0

    def means(self, allocation: Allocation, searching: bool = False) -> dict[str, Tensor]:
        """Running means re-estimated in the rounded network, on few samples while searching.

        Empty for a network without batch normalization.
        """
        if not self.corrects:
            return {}
        batches = self._searched() if searching else self.source.calibration
        return estimate_means(self.trial.take_on(allocation), batches, self.source.loss_fn)

    def tuned(self, allocation: Allocation, tuning: Tuning, means: Mapping[str, Tensor]) -> Rounder:
        """The allocation's layers with scales tuned on the calibration data."""
        source = self.source
        rounded = {layer.name: one for layer, _, one in quantized_layers(source.model, allocation, self.store)}
        tuned = tune_scales(
            source.model, allocation, rounded, source.calibration, source.loss_fn, tuning, means, self.progress
        )
        return Finished(f"{self.store.name}, tuned scales", tuned, self.store)

    def quality(
        self, allocation: Allocation, part: str, means: Mapping[str, Tensor] | None = None,
        rounder: Rounder | None = None,
    ) -> Quality:  # fmt: skip
        """The allocation's quality and divergence; NotFiniteError when it breaks the model."""
        return self.quality_of(self.trial.take_on(allocation, means, rounder), part)

    def noise_floor(self, part: str) -> Quality:
        """The noise floor: the original's divergence from itself when it is computed differently.

        A language model in 16 bits computes in float32; other models compute once more.
        """
        model, reference = self.source.model, self.reference(part)
        if self.source.kind == "perplexity":
            try:
                with in_float32(model):
                    return reference.measure(model, self.progress)
            except (MpqError, RuntimeError) as error:  # custom code that depends on the type
                log.info("the model does not compute in float32: %s", error)
        return reference.measure(model, self.progress)

    def quality_of(self, model: nn.Module, part: str) -> Quality:
        """The same of a finished model."""
        return self.reference(part).measure(model, self.progress)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of 16 bits as float32 inside the block; the tensors themselves come back after."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALVES]
    halves = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, half in zip(tensors, halves, strict=True):
            tensor.data = half


def measuring(source: Source, method: str) -> Callable[[Allocation, float], tuple[float, float]]:
    """The objective of evolution: the loss that an allocation adds on the first share of the calibration batches.

    With its standard error, from the differences on single samples: so the variance between samples cancels.
    """
    trial = Trial(source.model, store_for(method, source, find_layers(source.model)))
    references: dict[int, Quality] = {}  # by number of batches

    def quality(model: nn.Module, number: int) -> Quality:
        return evaluate(model, source.calibration[:number], source.kind, source.loss_fn)

    def measure(allocation: Allocation, share: float) -> tuple[float, float]:
        number = max(1, round(share * len(source.calibration)))
        if number not in references:
            references[number] = quality(source.model, number)
        try:
            return quality(trial.take_on(allocation), number).loss_above(references[number])
        except NotFiniteError:  # this allocation's own failure: the search goes on and tells how many there were
            return math.nan, math.nan

    return measure
