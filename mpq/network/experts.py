"""Mixtures of experts whose weights are stacked in one tensor, taken apart into linear layers that take schemes."""

import logging
from collections.abc import Iterator

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
    """All experts of a block: each runs on the tokens that chose it, those of no token do not run."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over a token's experts (tokens, k) of their outputs times their weights (tokens, k): (tokens, width)."""
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(chosen == index)
            if len(token):
                output = expert(hidden[token]) * weights[token, place, None]
                out.index_add_(0, token, output.to(out.dtype))
        return out


def unstack(model: nn.Module) -> nn.Module:
    """The same model, its stacked experts replaced, in place, by `Experts` that share their memory.

    Stacks are those of transformers since 5.0: gate_up_proj (experts, 2 * inner, width), gate above up, and down_proj
    (experts, width, inner), without biases. Each expert's three matrices become layers, "...experts.3.gate_proj".

    Stacks of another layout stay as they are, which is said in the log.
    """
    for name, module in list(_stacked(model)):
        gate_up, down = (getattr(module, stack) for stack in STACKS)
        count, width, inner = down.shape
        plain = set(dict(module.named_parameters())) == set(STACKS) and not getattr(module, "is_transposed", False)
        if not plain or gate_up.shape != (count, 2 * inner, width) or not getattr(module, "is_concatenated", True):
            kind = type(module).__name__
            log.warning("the experts %s of class %s are stacked in a layout that is not known and stay", name, kind)
            continue
        act: nn.Module = module.act_fn  # type: ignore[assignment]
        pairs = zip(gate_up.unbind(), down.unbind(), strict=True)
        model.set_submodule(name, Experts(Expert(*pair, act) for pair in pairs))
    return model


def say_stacked(model: nn.Module) -> None:
    """Say in the log which experts stay as they are because they are stacked."""
    names = [name for name, _ in _stacked(model)]
    if names:
        log.warning(
            "the experts %s are stacked and stay as they are: mpq.network.experts.unstack(model) makes layers of them",
            ", ".join(names),
        )


def has_experts(model: nn.Module) -> bool:
    """Whether experts were taken apart in this model."""
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
