"""From a network and an allocation to a program of integer operations."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.scheme import Scheme
from mpq.integer_only.program import IntegerProgram, Step, dyadic
from mpq.integer_only.trace import LAYERS, SAME, arguments, layer_of, operation, source_of, traced
from mpq.network.copies import copied
from mpq.network.ranges import static_scale
from mpq.quantized import quantized_layers
from mpq.rounding.codes import decode
from mpq.rounding.reference import Quantized
from mpq.rounding.store import Rounder
from mpq.training.batchnorm import fold_batchnorm

OUTPUT_BITS = 16  # network outputs are rescaled to this width, since their int32 sums may have several scales
LARGEST_BIAS = 2.0**30  # largest magnitude of a bias in int32 sums
PIECE = 64  # images that ranges are taken from at once
THROUGH = ("aten.slice.Tensor", "aten.pad.default", "aten.flatten.using_ints", "aten.max_pool2d.default", *SAME)


@dataclass(frozen=True)
class Term:
    """Integers and their scales."""

    name: str
    scale: Tensor  # float64 (channels,) or (1,)
    bound: float  # largest magnitude


@dataclass(frozen=True)
class Pending:
    """A sum of terms that is not rounded to codes yet; clipped below 0, above `top`."""

    terms: tuple[Term, ...]
    positive: bool = False
    top: float = float("inf")


@dataclass(frozen=True)
class Codes:
    """Stored codes with one scale."""

    name: str
    scale: float
    bounds: tuple[int, int]

    @property
    def term(self) -> Term:
        """As a term of a sum."""
        return Term(self.name, torch.tensor([self.scale], dtype=torch.float64), max(map(abs, self.bounds)))


Value: TypeAlias = Pending | Codes


def integer_program(
    model: nn.Module,
    allocation: Allocation,
    images: Tensor,
    method: str | Rounder = "mse",
    second_moments: Mapping[str, Tensor] | None = None,
) -> IntegerProgram:
    """The network in integers: weights and activations in the allocation's formats, sums in int32.

    Batch normalizations are folded into the layers before they are rounded. Each activation has one static scale, from
    its largest magnitude over `images`; sums of branches are rounded once. The outputs are 16-bit codes of one scale.

    Args:
        model: a network of convolutions, linear layers, ReLU and ReLU6, additions, padding, slices, max and global
            average pooling; left unchanged.
        allocation: schemes of all its layers, symmetric integers by channel or tensor with integer activations of one
            scale: "int4-channel+a:int8".
        images: calibration inputs, (samples, channels, height, width).
        method: rounding method of the weights, as in `mpq.simulate`.
        second_moments: of the layers' inputs, for methods that need them.

    Raises:
        MpqError: an operation, layer or scheme that has no integer form (named), or layers that read the same values in
            several formats (`residual_ties` prevents it).
    """
    _check(allocation)
    network = copied(model).eval()
    fold_batchnorm(network, images[:2], lambda module, batch: module(batch))
    weights = {layer.name: matrix for layer, _, matrix in quantized_layers(network, allocation, method, second_moments)}
    graph = traced(network, images)
    for name in (layer_of(node) for node in graph.graph.nodes if operation(node) in LAYERS):
        if name not in weights:
            raise MpqError(f"layer {name} has no scheme: integers alone need one for every layer")
    return _Builder(graph, network, allocation.scheme_of, weights, _spans(graph, images)).build()


def _check(allocation: Allocation) -> None:
    for name, scheme in allocation.scheme_of.items():
        for format, kinds in ((scheme.weight, ("channel", "tensor")), (scheme.activation, ("tensor",))):
            if format is None or not _is_plain_integer(format) or format.granularity not in kinds:
                raise MpqError(
                    f"layer {name} has {scheme.name}: integers alone take symmetric weights by channel and activations "
                    "of one scale, such as int4-channel+a:int8"
                )


def _is_plain_integer(format: Format) -> bool:
    plain = format.grid.family == "int" and format.is_plain and not format.zero_point and not format.minimum
    return plain and format.grid.bits <= 8


def _spans(graph: fx.GraphModule, images: Tensor) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every node over the images."""
    spans: dict[str, tuple[float, float]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op in ("placeholder", "call_function"):
                low, high = spans.get(n.name, (torch.inf, -torch.inf))
                spans[n.name] = min(low, float(result.min())), max(high, float(result.max()))
            return result

    with torch.no_grad():
        for piece in torch.split(images, PIECE):
            Watch(graph).run(piece)
    return spans


class _Builder:
    def __init__(
        self, graph: fx.GraphModule, network: nn.Module, schemes: Mapping[str, Scheme],
        weights: Mapping[str, Quantized], spans: Mapping[str, tuple[float, float]],
    ) -> None:  # fmt: skip
        self.graph, self.network, self.schemes, self.weights, self.spans = graph, network, schemes, weights, spans
        self.values: dict[fx.Node, Value] = {}
        self.codes: dict[fx.Node, Codes] = {}
        self.steps: list[Step] = []

    def build(self) -> IntegerProgram:
        inputs, outputs = [], []
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                inputs.append(node)
                scale, bounds = self._grid(node)
                self.values[node] = self.codes[node] = Codes(node.name, scale, bounds)
            elif node.op == "output":
                outputs = list(arguments(node)[0])
            elif operation(node):
                self.values[node] = self._value(node)
        if len(inputs) != 1 or len(outputs) != 1:
            raise MpqError(f"integers alone take one input and one output, not {len(inputs)} and {len(outputs)}")
        start, end = self.codes[inputs[0]], self._outputs(source_of(outputs[0]))
        stored = {codes.name: -codes.bounds[0] for codes in self.codes.values()}
        return IntegerProgram(
            tuple(self.steps), start.name, end.name, start.scale, start.bounds, end.scale, {**stored, end.name: 0}
        )

    def _value(self, node: fx.Node) -> Value:
        name = operation(node)
        if name not in RULES:
            raise MpqError(f"{name.removeprefix('aten.')} ({node.name}) has no integer form: leave it out")
        return RULES[name](self, node)

    def add(self, operation: str, inputs: tuple[str, ...], output: str, **values: Any) -> str:
        self.steps.append(Step(operation, inputs, output, values))
        return output

    def stored(self, node: fx.Node) -> Codes:
        """The node's values as codes in the format of the layers that read them."""
        node = source_of(node)
        value = self.values[node]
        if isinstance(value, Codes):
            return value
        if node not in self.codes:
            self.codes[node] = self._rescale(value, f"{node.name}.codes", *self._grid(node))
        return self.codes[node]

    def terms(self, node: fx.Node) -> tuple[Term, ...]:
        """The node's values as terms of a sum: clipped ones are rounded first."""
        value = self.values[source_of(node)]
        if isinstance(value, Pending) and not value.positive:
            return value.terms
        return (self.stored(node).term,)

    def _rescale(self, value: Pending, name: str, scale: float, bounds: tuple[int, int]) -> Codes:
        low = max(bounds[0], 0) if value.positive else bounds[0]
        high = min(bounds[1], round(value.top / scale)) if value.top < torch.inf else bounds[1]
        multipliers, shift = dyadic([term.scale / scale for term in value.terms], [term.bound for term in value.terms])
        names = tuple(term.name for term in value.terms)
        self.add("rescale", names, name, multipliers=multipliers, shift=shift, low=low, high=high)
        return Codes(name, scale, bounds)

    def _outputs(self, node: fx.Node) -> Codes:
        value, largest = self.values[node], 2 ** (OUTPUT_BITS - 1) - 1
        pending = Pending((value.term,)) if isinstance(value, Codes) else value
        scale = (
            max(map(abs, self.spans[node.name])) * 2 / largest or 1.0
        )  # twice the range: unseen outputs may be larger
        return self._rescale(pending, "outputs", scale, (-largest, largest))

    def _grid(self, node: fx.Node) -> tuple[float, tuple[int, int]]:
        format = self._format(node)
        return static_scale(format, self.spans[node.name]), (int(format.grid.min), int(format.grid.max))

    def _format(self, node: fx.Node) -> Format:
        readers = self._readers(node, THROUGH) or self._readers(node, None)
        formats = {self.schemes[name].activation for name in readers}
        if not readers:
            raise MpqError(f"no layer reads the values of {node.name}: they have no format")
        if len(formats) > 1:
            raise MpqError(
                f"{', '.join(readers)} read the same values in several activation formats: give them one scheme "
                "(mpq.integer_only.residual_ties)"
            )
        (format,) = formats
        assert format is not None
        return format

    def _readers(self, node: fx.Node, through: tuple[str, ...] | None) -> list[str]:
        """The layers that read a node's values: through operations that keep codes, or any (None) to the nearest."""
        readers: dict[str, None] = {}
        for user in node.users:
            if operation(user) in LAYERS:
                readers.update({layer_of(user): None})
            elif through is None or operation(user) in through:
                readers.update(dict.fromkeys(self._readers(user, through)))
        return list(readers) if through is not None else list(readers)[:1]


def _layer(builder: _Builder, node: fx.Node) -> Value:
    name, inputs = layer_of(node), builder.stored(arguments(node)[0])
    quantized = builder.weights[name]
    module: Any = builder.network.get_submodule(name)
    assert quantized.scales is not None
    shape = module.weight.shape
    weight = decode(quantized.codes, quantized.format.grid).double()
    scale = quantized.scales.double().flatten().expand(shape[0]) * inputs.scale
    bias = torch.zeros(shape[0], dtype=torch.float64) if module.bias is None else module.bias.detach().double()
    wide = bias.abs() > LARGEST_BIAS * scale.abs()  # next to such a bias the channel's weights are rounding errors
    coarser = torch.where(wide, bias.abs() / LARGEST_BIAS, scale)
    weight = (weight * (scale / coarser).unsqueeze(1)).round().long().reshape(shape)
    scale, bias = coarser, (bias / coarser).round().long()
    largest = max(map(abs, inputs.bounds))
    bound = float((weight.abs().flatten(1).sum(1) * largest + bias.abs()).max())
    if bound >= 2**31:
        raise MpqError(f"sums of layer {name} can exceed int32 ({bound:.0f}): give it fewer bits")
    options: dict[str, Any] = {"weight": weight, "bias": bias}
    if operation(node) != "aten.linear.default":
        options |= dict(zip(("stride", "padding", "dilation", "groups"), _conv_options(node), strict=True))
    kind = "linear" if operation(node) == "aten.linear.default" else "conv"
    builder.add(kind, (inputs.name,), node.name, **options)
    return Pending((Term(node.name, scale, bound),))


def _conv_options(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    ones = [1] * (2 if operation(node) == "aten.conv2d.default" else 1)
    given = list(arguments(node)[3:]) + [None] * 4
    stride, padding, dilation, groups = given[:4]
    return list(stride or ones), list(padding or [0 for _ in ones]), list(dilation or ones), int(groups or 1)


def _clipped(top: float) -> Callable[[_Builder, fx.Node], Value]:
    def clip(builder: _Builder, node: fx.Node) -> Value:
        value = builder.values[source_of(arguments(node)[0])]
        pending = Pending((value.term,)) if isinstance(value, Codes) else value
        return replace(pending, positive=True, top=min(top, pending.top))

    return clip


def _added(builder: _Builder, node: fx.Node) -> Value:
    left, right = arguments(node)[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or node.kwargs:
        raise MpqError(f"{node.name} adds a constant: integers alone add values of the network")
    return Pending((*builder.terms(left), *builder.terms(right)))


def _same(builder: _Builder, node: fx.Node) -> Value:
    return builder.values[source_of(arguments(node)[0])]


def _kept(step: str, values: Callable[[fx.Node], dict[str, Any]]) -> Callable[[_Builder, fx.Node], Value]:
    """An operation that moves codes and keeps their scale."""

    def keep(builder: _Builder, node: fx.Node) -> Value:
        codes = builder.stored(arguments(node)[0])
        moved = replace(codes, name=builder.add(step, (codes.name,), node.name, **values(node)))
        builder.codes[node] = moved
        return moved

    return keep


def _mean(builder: _Builder, node: fx.Node) -> Value:
    codes = builder.stored(arguments(node)[0])
    adaptive = operation(node) != "aten.mean.dim"
    if adaptive and set(arguments(node)[1]) != {1}:
        raise MpqError(f"{node.name} pools to more than one position: integers alone take global average pooling")
    dims = [-1, -2] if adaptive else list(arguments(node)[1])
    keepdim = adaptive or bool(arguments(node)[2:] and arguments(node)[2])
    shape = arguments(node)[0].meta["val"].shape
    count = 1
    for dim in dims:
        count = operator.mul(count, int(shape[dim]))
    name = builder.add("sum", (codes.name,), node.name, dims=[dim % len(shape) for dim in dims], keepdim=keepdim)
    return Pending((Term(name, codes.term.scale / count, codes.term.bound * count),))


def _slice(node: fx.Node) -> dict[str, Any]:
    given = [*arguments(node)[1:], *(0, 0, 2**63 - 1, 1)[len(arguments(node)) - 1 :]]
    dim, start, end, step = given
    return {"dim": dim, "start": start or 0, "end": 2**63 - 1 if end is None else end, "step": step}


def _pad(node: fx.Node) -> dict[str, Any]:
    rest = [part for part in arguments(node)[2:] if part not in ("constant", 0, 0.0, None)]
    if rest:
        raise MpqError(f"{node.name} pads with other values than zero: integers alone pad with zeros")
    return {"sides": list(arguments(node)[1])}


def _maxpool(node: fx.Node) -> dict[str, Any]:
    size = list(arguments(node)[1])
    rest = [list(part) for part in arguments(node)[2:5]]
    stride, padding, dilation = [*rest, *([size, [0, 0], [1, 1]][len(rest) :])]
    return {"kernel_size": size, "stride": stride or size, "padding": padding, "dilation": dilation}


RULES: dict[str, Callable[[_Builder, fx.Node], Value]] = {
    **dict.fromkeys(LAYERS, _layer), **dict.fromkeys(SAME, _same),
    "aten.relu.default": _clipped(torch.inf), "aten.relu_.default": _clipped(torch.inf),
    "aten.relu6.default": _clipped(6.0), "aten.add.Tensor": _added, "aten.add_.Tensor": _added,
    "aten.mean.dim": _mean, "aten.adaptive_avg_pool2d.default": _mean,
    "aten.slice.Tensor": _kept("slice", _slice), "aten.pad.default": _kept("pad", _pad),
    "aten.max_pool2d.default": _kept("maxpool", _maxpool), "aten.flatten.using_ints": _kept("flatten", lambda node: {}),
}  # fmt: skip
