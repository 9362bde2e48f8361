"""Stable-SPAM (arXiv 2502.17055): Adam with gradients clipped and normalized by their history.

Rounding in few bits makes single gradients, and whole steps, larger by spikes. Each spike is cut to the running largest
magnitude (AdaClip), each gradient's norm is divided by the root of its running mean square (AdaGN), and the moments
start anew every `reset_every` steps, so that a spike is forgotten (momentum reset of SPAM, arXiv 2501.06842).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mpq.core.errors import MpqError


class StableSPAM(torch.optim.Optimizer):
    """AdamW with adaptive clipping, adaptive gradient norms and momentum resets.

    Args:
        params: parameters or groups, as for every optimizer.
        lr: learning rate.
        betas: decays of Adam's moments.
        gammas: decays of the mean norm, of the mean squared norm, and of the largest magnitude.
        reset_every: steps after which Adam's moments are zeroed; 0 for never.
        eps: added to both roots.
        weight_decay: decoupled, as in AdamW.

    Raises:
        MpqError: a rate, decay or interval outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        reset_every: int = 1000,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        decays = (*betas, *gammas)
        if lr < 0 or reset_every < 0 or weight_decay < 0 or not all(0 <= decay < 1 for decay in decays):
            raise MpqError(
                "StableSPAM takes decays of 0 to 1 and no negative rate, interval or weight decay, not "
                f"lr={lr}, betas={betas}, gammas={gammas}, reset_every={reset_every}, weight_decay={weight_decay}"
            )
        options = {"lr": lr, "betas": betas, "gammas": gammas, "reset_every": reset_every, "eps": eps}
        super().__init__(params, {**options, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter] or self._fresh(parameter)
                    state["step"] += 1
                    gradient = _normalized(_clipped(parameter.grad.float(), state, group), state, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_((group["lr"] * _adam(gradient, state, group)).to(parameter.dtype))
        return loss

    def _fresh(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        state.update(step=0, age=0)
        state.update(
            {
                name: torch.zeros((), device=parameter.device, dtype=torch.float32)
                for name in ("largest", "norm", "squared_norm")
            }
        )
        state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("first", "second")})
        return state


def _average(state: dict[str, Any], name: str, value: Tensor, decay: float, steps: int) -> Tensor:
    """The running mean of a state, corrected for its start at zero."""
    state[name].lerp_(value, 1 - decay)
    mean: Tensor = state[name] / (1 - decay**steps)
    return mean


def _clipped(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    largest = gradient.abs().amax()
    limit = _average(state, "largest", largest, group["gammas"][2], state["step"])
    clipped: Tensor = torch.where(gradient.abs() > limit, gradient / largest * limit, gradient)
    return clipped


def _normalized(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    norm, (first, second, _) = gradient.norm(), group["gammas"]
    mean = _average(state, "norm", norm, first, state["step"])
    square = _average(state, "squared_norm", norm.square(), second, state["step"])
    normalized: Tensor = gradient / norm.clamp(min=torch.finfo(torch.float32).tiny) * mean
    normalized = normalized / (square.sqrt() + group["eps"])
    return normalized


def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if group["reset_every"] and state["age"] == group["reset_every"]:
        state["first"].zero_()
        state["second"].zero_()
        state["age"] = 0
    state["age"] += 1
    first = _average(state, "first", gradient, group["betas"][0], state["age"])
    second = _average(state, "second", gradient.square(), group["betas"][1], state["age"])
    update: Tensor = first / (second.sqrt() + group["eps"])
    return update
