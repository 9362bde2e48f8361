"""One-shot search (FLIQS, arXiv 2308.03290): formats are sampled while the weights train, and no retraining follows."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.costs import bitops, weight_bytes
from mpq.core.errors import MpqError, nearest_names
from mpq.core.hardware import Machine, area
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.network.copies import copied
from mpq.network.layers import find_layers
from mpq.network.macs import count_macs
from mpq.rounding.store import Rounder
from mpq.search.architecture import Architecture, Choice, sliced
from mpq.search.controller import Controller, Schedule, Step
from mpq.search.repair import likeliest_within, likely_within
from mpq.training.fake import FakeQuantization

Cost = Callable[[Layer, Scheme], float]
COSTS: dict[str, Cost] = {
    "size": lambda layer, scheme: weight_bytes(scheme, layer.rows, layer.cols),
    "bitops": lambda layer, scheme: bitops(scheme, layer.macs),
    "area": area,
    "latency": Machine().seconds,
}


class OneShot:
    """A search that drops into a training loop.

    Inside `with search.sample():` the model's layers compute in sampled schemes; `update` passes their quality to the
    policy. After the schedule the model computes in the final choice, the likeliest one within the target, so that the
    weights adapt to it. The trained model is exported without rounding again by

        mpq.export(model, search.allocation(), folder, method=search.rounder())

    Args:
        model: trained in place; its parameters, optimizer and checkpoints need no changes.
        space: the candidate schemes of every layer; activations are searched where schemes name their format
            ("int4-channel+a:int4").
        cost: "bitops", "size", "area" (`mpq.core.hardware.mac_area`), "latency" (of `mpq.core.hardware.Machine`), or a
            function of a layer and a scheme, as `mpq.core.latency.LatencyTable.cost`.
        target: the wanted cost, as a share of the model's cost in the space's costliest schemes.
        schedule: steps, delay, rates and weights.
        blocks: a regular expression; layers whose names it matches with the same text, from the start, share a scheme
            (r"layer\\d\\.\\d" decides by residual block). Tied layers (q/k/v, gate/up) always share.
        include: patterns of the layers to search.
        exclude: patterns of layers to leave in floating point.
        method: rounding method that sets weight scales in every step.
        learned: whether weight scales are parameters (LSQ); add `search.parameters()` to the optimizer.
        architecture: widths and kernels to choose together with the formats (`mpq.search.architecture`); costs are of
            both, and `network()` is the model without unused parts.
        seed: of the samples.

    Raises:
        MpqError: no layers, unknown names, a target that cannot be reached (with the range that can), or tied layers
            in different blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Sequence[str | Scheme],
        cost: str | Cost = "bitops",
        target: float = 0.25,
        *,
        schedule: Schedule | None = None,
        blocks: str | None = None,
        include: str | Iterable[str] = ("*",),
        exclude: str | Iterable[str] = (),
        method: str = "nearest",
        learned: bool = False,
        architecture: Sequence[Choice] = (),
        seed: int = 0,
    ) -> None:
        self.space = tuple(dict.fromkeys(parse_scheme(str(scheme)) for scheme in space))
        if len(self.space) < 2:
            raise MpqError(f"invalid space: expected at least two schemes, not {len(self.space)}")
        if isinstance(cost, str) and cost not in COSTS:
            raise MpqError(
                f"unknown cost {cost!r}: {nearest_names(cost, COSTS)}, or a function of a layer and a scheme"
            )
        self.layers = find_layers(model, include, exclude)
        self.target = target
        self.history: list[Step] = []
        self._choices: NDArray[np.intp] | None = None
        self.groups = _groups(self.layers, blocks)
        self.architecture = Architecture(model, self.layers, architecture)
        if architecture and any(scheme.weight.granularity == "group" for scheme in self.space):
            raise MpqError("groups of columns cannot be cut: search an architecture with formats by channel or tensor")
        counts = [len(self.space)] * len(self.groups) + [choice.options for choice in self.architecture.choices]
        self.controller = Controller(len(counts), max(counts), schedule or Schedule(), seed, counts)
        self._cost = COSTS[cost] if isinstance(cost, str) else cost
        self._counted = False  # multiplications, in the model's first pass
        formats = [scheme.weight for scheme in self.space] if learned else []
        self.model = model
        self.quantization = FakeQuantization(model, self.layers, method=method, learned=formats)
        self._counter = model.register_forward_pre_hook(self._count, with_kwargs=True)
        if cost not in ("bitops", "area", "latency"):
            self._check_target()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Learned scales, for the optimizer; none unless `learned`."""
        return self.quantization.parameters()

    @contextmanager
    def sample(self) -> Iterator[tuple[Scheme, ...]]:
        """Inside the block the model computes in schemes sampled from the policy; yields them, one per layer.

        Gradients may be taken after the block, unless activations are recomputed (gradient checkpointing).
        """
        self._choices = self._best() if self.controller.is_fixed and self._counted else self.controller.sample()
        with self._computing_in(self._choices) as schemes:
            yield schemes

    @contextmanager
    def chosen(self) -> Iterator[tuple[Scheme, ...]]:
        """Inside the block the model computes in the likeliest schemes within the target, for validation."""
        with self._computing_in(self._best()) as schemes:
            yield schemes

    def update(self, *, quality: float) -> Step:
        """Update the policy with the quality of the last sample; higher is better.

        Qualities should move by about 1 between good and bad samples: the reward takes off `cost_weight` for a cost of
        twice the target. A quality that is not finite is recorded but not learned from.

        Raises:
            MpqError: nothing was sampled since the last update.
        """
        if self._choices is None:
            raise MpqError("no sample to update from: run the model inside `with search.sample():` first")
        step = self.controller.update(self._choices, quality, self.cost_of(self._choices))
        self._choices = None
        self.history.append(step)
        return step

    def cost_of(self, choices: Sequence[int] | NDArray[np.intp]) -> float:
        """Cost of one option per decision, as a share of the target: formats first, then the architecture.

        Raises:
            MpqError: the cost counts multiplications, and the model has not run yet.
        """
        largest = self._costs().max(1).sum()
        if largest <= 0:
            raise MpqError(
                "the multiplications are not counted yet: run the model inside `with search.sample():` first"
            )
        schemes = self._schemes(np.asarray(choices))
        pairs = zip(self._scaled(choices), schemes, strict=True)
        return float(sum(self._cost(layer, scheme) for layer, scheme in pairs) / (self.target * largest))

    def allocation(self) -> Allocation:
        """The likeliest schemes within the target; the provenance says cost, certainty and how weights are rounded.

        Its `loss` is unknown. "likeliest_over_target" is what the likeliest schemes would cost alone.
        """
        best, likeliest = self._best(), self.controller.best()
        provenance = {
            "search": "one-shot", "seed": self.controller.seed, "steps": self.controller.step, "target": self.target,
            "cost_over_target": self.cost_of(best), "likeliest_over_target": self.cost_of(likeliest),
            "entropy": self.controller.entropy, "rounding": self.quantization.method,
        }  # fmt: skip
        schemes = tuple(scheme.name for scheme in self._schemes(best))
        return Allocation(self._scaled(best), schemes, metric="one-shot", provenance=provenance)

    def rounder(self) -> Rounder:
        """Rounded weights of the final choice, learned scales included, for `mpq.export`.

        A packed model scales activations at run time; where they share one scale, training took a moving average.
        """
        best = self._best()
        with self._computing_in(best):
            rounder = self.quantization.rounder()
        if not self.architecture.choices:
            return rounder
        kept = self.architecture.kept(self.layers, self._options(best))
        pairs = zip(self.layers, kept, strict=True)
        cut = {layer.name: sliced(rounder.rounded[layer.name], *used) for layer, used in pairs}
        return replace(rounder, rounded=cut)

    def network(self) -> nn.Module:
        """A copy of the model, without hooks and without parts that the final choice does not use, for `mpq.export`."""
        network = copied(self.model)
        ours = {handle.id for handle in (self._counter, *self.quantization.handles)}
        for module in network.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key in hooks if key in ours]:
                    del hooks[key]
        self.architecture.cut(network, self._options(self._best()))
        return network

    def switching_errors(self, loss: Callable[[], float]) -> NDArray[np.float64]:
        """Loss that one decision's switch to each option adds to the final choice's: (decisions, options).

        The shared weights are adapted to the formats they were trained in; the loss in other formats, even wider ones,
        is the switching error of section 3.3.

        Args:
            loss: runs the model, without training it.
        """
        best = self._best()
        counts = self.controller.counts.tolist()
        above = np.zeros((len(counts), max(counts)))
        with self._computing_in(best):
            start = loss()
        for decision, option in np.ndindex(*above.shape):
            if option < counts[decision] and option != best[decision]:
                switched = best.copy()
                switched[decision] = option
                with self._computing_in(switched):
                    above[decision, option] = loss() - start
        return above

    def state_dict(self) -> dict[str, Any]:
        """The search's state for a checkpoint, beside the model's and the optimizer's own."""
        return {"controller": self.controller.state_dict(), "quantization": self.quantization.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint; MpqError if it is of another search."""
        self.controller.load_state_dict(state["controller"])
        self.quantization.load_state_dict(state["quantization"])

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._counter.remove()
        self.quantization.remove()

    @contextmanager
    def _computing_in(self, choices: NDArray[np.intp]) -> Iterator[tuple[Scheme, ...]]:
        schemes = self._schemes(choices)
        masks = self.architecture.masks(self.layers, self._options(choices)) if self.architecture.choices else None
        self.quantization.use({layer.name: scheme for layer, scheme in zip(self.layers, schemes, strict=True)}, masks)
        try:
            yield schemes
        finally:
            self.quantization.use({})

    def _best(self) -> NDArray[np.intp]:
        """The likeliest option of each decision, together within the target."""
        log_probabilities = self.controller.logits.detach().double().log_softmax(1).numpy()
        if self.architecture.choices:
            return likely_within(log_probabilities, self.cost_of, 1.0)
        costs = self._costs()
        return likeliest_within(log_probabilities, costs, self.target * float(costs.max(1).sum()))

    def _schemes(self, choices: NDArray[np.intp]) -> tuple[Scheme, ...]:
        pairs = zip(self.groups, choices[: len(self.groups)], strict=True)
        by_layer = {layer: self.space[choice] for group, choice in pairs for layer in group}
        return tuple(by_layer[index] for index in range(len(self.layers)))

    def _options(self, choices: Sequence[int] | NDArray[np.intp]) -> list[int]:
        """Costs of the architecture's options."""
        return [int(choice) for choice in choices[len(self.groups) :]]

    def _scaled(self, choices: Sequence[int] | NDArray[np.intp]) -> tuple[Layer, ...]:
        return (
            self.architecture.scaled(self.layers, self._options(choices)) if self.architecture.choices else self.layers
        )

    def _costs(self, options: Sequence[int] = ()) -> NDArray[np.float64]:
        """Costs of formats, (decisions, options), in the whole architecture or in this one."""
        layers = self.architecture.scaled(self.layers, options) if options else self.layers
        by_layer = np.array([[self._cost(layer, scheme) for scheme in self.space] for layer in layers], np.float64)
        return np.array([by_layer[list(group)].sum(0) for group in self.groups])

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count multiplications in a separate pass before the model runs for the first time."""
        self._counter.remove()
        self._counted = True
        self.layers = count_macs(model, self.layers, (args, kwargs), lambda model, batch: model(*batch[0], **batch[1]))
        self._check_target()

    def _check_target(self) -> None:
        largest = self._costs().max(1).sum()
        smallest = self._costs([0] * len(self.architecture.choices)).min(1).sum()
        if largest > 0 and not smallest / largest <= self.target <= 1:
            raise MpqError(
                f"a target of {self.target:g} cannot be reached: these schemes cost {smallest / largest:.4g} "
                "to 1 of the costliest"
            )


def _groups(layers: Sequence[Layer], blocks: str | None) -> tuple[tuple[int, ...], ...]:
    """Layers that share a decision: those of a block, those of a tie, or a layer alone."""
    try:
        expression = None if blocks is None else re.compile(blocks)
    except re.error as error:
        raise MpqError(f"invalid regular expression for blocks {blocks!r}: {error}") from error
    keys = []
    block_of_tie: dict[str, str] = {}
    for layer in layers:
        match = None if expression is None else expression.match(layer.name)
        block = match.group() if match else ""
        if layer.tie and block_of_tie.setdefault(layer.tie, block) != block:
            raise MpqError(
                f"blocks {blocks!r} puts the tied layers {layer.tie}, which share a scheme, in different blocks"
            )
        keys.append(f"block {block}" if block else f"tie {layer.tie}" if layer.tie else f"layer {layer.name}")
    if expression is not None and not any(key.startswith("block ") for key in keys):
        raise MpqError(f"blocks {blocks!r} matches no layer: names are like {layers[0].name}")
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return tuple(tuple(group) for group in members.values())
