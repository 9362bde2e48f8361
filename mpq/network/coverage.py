"""Coverage: the share of a model that is quantized, and what stays in floating point and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mpq.core.layer import Layer
from mpq.network.experts import STACKS
from mpq.network.layers import BASES, layer_kind

EXCLUDED = "layers left out by include or exclude"
VECTORS = "biases, norms and other vectors"
ATTENTION = "fused weights of nn.MultiheadAttention"
RECURRENT = "weights of LSTM, GRU and other recurrent modules"
EXPERTS = "stacked experts (mpq.network.experts.unstack makes layers of them)"
FOREIGN = "weights that are not plain floating-point numbers, or are computed in an unknown way"


@dataclass(frozen=True)
class Left:
    """Parameters that stay in floating point for one reason."""

    reason: str
    params: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """Quantized share of a model; shared parameters count once."""

    params: int  # all parameters of the model
    quantized: int  # quantized parameters
    macs: int  # multiply-accumulates of one sample in the whole model; 0 where unknown
    quantized_macs: int
    left: tuple[Left, ...] = ()  # largest first

    def to_json(self) -> dict[str, Any]:
        """JSON values; at most three names for each reason."""
        return {**asdict(self), "left": [{**asdict(each), "names": list(each.names[:3])} for each in self.left]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Coverage":
        """The inverse of `to_json`."""
        left = tuple(Left(each["reason"], each["params"], tuple(each["names"])) for each in values["left"])
        return Coverage(values["params"], values["quantized"], values["macs"], values["quantized_macs"], left)

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of a table for readers: what, share of the parameters, examples."""
        lines = [("quantized", self._share(self.quantized), "")]
        return lines + [(each.reason, self._share(each.params), ", ".join(each.names[:3])) for each in self.left]

    def __str__(self) -> str:
        text = f"Quantized: {self._share(self.quantized)} of the parameters"
        if self.macs:
            text += f", {_percent(self.quantized_macs / self.macs)} of the multiply-adds"
        left = [f"{each.reason} {self._share(each.params)}" for each in self.left]
        return text + (f". In floating point: {'; '.join(left)}." if left else ".")

    def _share(self, params: int) -> str:
        return _percent(params / max(self.params, 1))


def coverage(model: nn.Module, layers: Sequence[Layer], macs: int = 0) -> Coverage:
    """The coverage of a model by these layers; `macs` of the whole model needs layers with counted macs."""
    covered = {id(model.get_submodule(layer.name)._parameters.get("weight")) for layer in layers}
    left: dict[str, list[tuple[str, int]]] = {}
    total = 0
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in covered:
                continue
            covered.add(id(parameter))
            total += parameter.numel()
            name = f"{module_name}.{leaf}".lstrip(".")
            left.setdefault(_reason(module, leaf), []).append((name, parameter.numel()))
    quantized = sum(layer.params for layer in layers)
    groups = [
        Left(
            reason, sum(size for _, size in names), tuple(name for name, _ in sorted(names, key=lambda each: -each[1]))
        )
        for reason, names in left.items()
    ]
    groups.sort(key=lambda each: -each.params)
    return Coverage(quantized + total, quantized, macs, min(macs, sum(layer.macs for layer in layers)), tuple(groups))


def _reason(module: nn.Module, leaf: str) -> str:
    parameter = module._parameters[leaf]
    if leaf == "weight" and layer_kind(module) is not None:
        return EXCLUDED
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and parameter is not None and parameter.ndim > 1:
        return RECURRENT
    if parameter is None or parameter.ndim < 2:
        return VECTORS
    if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return ATTENTION
    if leaf in STACKS and parameter.ndim == 3:
        return EXPERTS
    if leaf == "weight" and isinstance(module, tuple(BASES.values())):
        return FOREIGN
    return f"parameters of {type(module).__name__}"


def _percent(share: float) -> str:
    """A share as a percentage.

    >>> _percent(0.98765), _percent(0.0004), _percent(1.0)
    ('98.8 %', '0.04 %', '100 %')
    """
    return f"{100 * share:.3g} %"
