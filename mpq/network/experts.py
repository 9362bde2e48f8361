"""Unstacking of mixtures of experts: weights stacked in one tensor become linear layers that take schemes."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

STACKS = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One gated expert, down(act(gate(x)) * up(x)), whose weights are views of the stacks."""

    def __init__(self, gate_up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Experts(nn.ModuleList):
    """All experts of a block; each runs on the tokens routed to it."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts (tokens, width); `chosen` and `weights` are (tokens, k)."""
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(chosen == index)
            if len(token):
                output = expert(hidden[token]) * weights[token, place, None]
                out.index_add_(0, token, output.to(out.dtype))
        return out


def unstack(model: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """Replace the model's stacked experts, in place, by `Experts` that share their memory; return the model.

    Supported stacks are those of transformers 5: gate_up_proj (experts, 2 * inner, width), gate above up, and down_proj
    (experts, width, inner), without biases. Each expert's three matrices become layers, "...experts.3.gate_proj".

    Stacks whose parameters are named in `keep` stay as they are; others too, with a warning in the log.
    """
    for name, module in list(_stacked(model)):
        if f"{name}.{STACKS[0]}" in keep:
            continue
        gate_up, down = (getattr(module, stack) for stack in STACKS)
        count, width, inner = down.shape
        plain = set(dict(module.named_parameters())) == set(STACKS) and not getattr(module, "is_transposed", False)
        if not plain or gate_up.shape != (count, 2 * inner, width) or not getattr(module, "is_concatenated", True):
            kind = type(module).__name__
            log.warning(
                "the experts %s of class %s are stacked in an unknown layout: they are not quantized", name, kind
            )
            continue
        act: nn.Module = module.act_fn  # type: ignore[assignment]
        pairs = zip(gate_up.unbind(), down.unbind(), strict=True)
        model.set_submodule(name, Experts(Expert(*pair, act) for pair in pairs))
    return model


def warn_about_stacks(model: nn.Module) -> None:
    """Warn in the log about stacked experts, which are not quantized."""
    names = [name for name, _ in _stacked(model)]
    if names:
        log.warning(
            "the experts %s are stacked and not quantized: mpq.network.experts.unstack(model) makes layers of them",
            ", ".join(names),
        )


@contextmanager
def routing(model: nn.Module) -> Iterator[Mapping[nn.Module, tuple[int, Tensor]]]:
    """While the block runs: for each expert's layer, the number of tokens and the places of those routed to it."""
    routed: dict[nn.Module, tuple[int, Tensor]] = {}

    def note(experts: Any, args: tuple[Any, ...]) -> None:
        hidden, chosen, _ = args
        for index, expert in enumerate(experts):
            places = torch.where(chosen == index)[0]
            routed.update((layer, (len(hidden), places)) for layer in expert.children())

    handles = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, Experts)]
    try:
        yield routed
    finally:
        for handle in handles:
            handle.remove()


def has_experts(model: nn.Module) -> bool:
    """Whether this model holds unstacked experts."""
    return any(isinstance(module, Experts) for module in model.modules())


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if all(getattr(getattr(module, stack, None), "ndim", 0) == 3 for stack in STACKS):
            yield name, module


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear
