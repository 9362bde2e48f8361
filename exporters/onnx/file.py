"""ONNX: weights as integers or fp8 at each layer's own width, activations as static QDQ pairs.

The graph is torch's own export of the model; only the weights and the inputs of the layers are changed. A linear layer
whose weight alone is quantized becomes ONNX Runtime's MatMulNBits, every other weight comes out of a DequantizeLinear.
A graph of more than 2 GB, which no protobuf holds, keeps its tensors in a file beside it.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, first_line
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.exporters.folder import copy_side_files, names_of, refuse_foreign, write_checksums, write_folder
from mpq.exporters.holding import check, check_packages
from mpq.exporters.onnx.nodes import Graph, drop_unused, products_with, put_products, put_weight, round_inputs
from mpq.exporters.onnx.operators import OPSET, OPSET_INT2, nbits_block, needs_int2
from mpq.exporters.onnx.reader import read_back
from mpq.exporters.request import ExportRequest
from mpq.exporters.targets import TARGETS
from mpq.kernels.layout import empty, unpack
from mpq.network.calibration import evaluating
from mpq.network.ranges import Ranges
from mpq.quantized import checked_layers
from mpq.rounding.reference import Quantized, dequantize

FILE, DATA = "model.onnx", "model.onnx.data"
INSIDE = 1_900_000_000  # bytes of tensors in one protobuf, whose limit is 2**31 - 1 with everything
Layers = Iterable[tuple[Layer, Scheme, Quantized]]


def export(request: ExportRequest) -> Path:
    """Write `model.onnx`, of a model on the CPU in float32; the folder.

    The graph is traced with the request's inputs, a tensor or a tuple of them; the first dimension of each is left
    open. Tensors of more bytes in all than `shard` or a protobuf allows are written to `model.onnx.data`, one layer in
    memory at a time. Schemes with activations need the ranges.

    Raises:
        MpqError: a scheme that ONNX cannot hold, no inputs, no range for a layer that needs one, a missing package;
            the graph's weights or its outputs in ONNX Runtime differ from the simulated model.
    """
    model, allocation, inputs, ranges = request.model, request.allocation, request.inputs, request.ranges
    _refuse(allocation, inputs, ranges)
    refuse_foreign(request.folder, (FILE, DATA, "allocation.json", *names_of(request.side_files)))
    traced, names = _trace(model, allocation, inputs)
    matrices: dict[str, Tensor] = {}
    rounded = _kept(request.rounded(), matrices)
    with write_folder(request.folder) as draft:
        if _tensor_bytes(traced, allocation) > min(request.shard, INSIDE):
            with (draft / DATA).open("wb") as data:
                graph = _fill(Graph(traced, data, DATA), model, rounded, names, ranges)
        else:
            graph = _fill(Graph(traced), model, rounded, names, ranges)
        (draft / FILE).write_bytes(graph.model.SerializeToString())
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        read_back(draft / FILE, model, allocation, matrices, given, ranges)
        copy_side_files(draft, request.side_files)
        allocation.save(draft / "allocation.json")
        write_checksums(draft, {})
    return request.path


def file_size(
    model: nn.Module,
    allocation: Allocation,
    inputs: Tensor | tuple[Any, ...],
    shard: int = INSIDE,
    trace: Callable[[Allocation], tuple[Any, set[str]]] | None = None,
) -> int:
    """Bytes that the graph's file (and the one beside it) will have, before anything is rounded; `trace` gives a graph
    that was traced before.
    """
    _refuse(allocation, inputs, None, sized=True)
    traced, names = _trace(model, allocation, inputs) if trace is None else trace(allocation)
    ranges = {layer.name: (0.0, 1.0) for layer in allocation.layers}
    blank = (
        (layer, scheme, unpack(empty(scheme.weight, layer.rows, layer.cols)))
        for layer, scheme in checked_layers(model, allocation)
    )
    with open(os.devnull, "wb") as nowhere:
        data: BinaryIO | None = nowhere if _tensor_bytes(traced, allocation) > min(shard, INSIDE) else None
        graph = _fill(Graph(traced, data, DATA), model, blank, names, ranges)
    return int(graph.model.ByteSize()) + graph.end


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """`file_size` of a model that is traced once for all allocations of the same layers."""

    @cache
    def traced(layers: tuple[Layer, ...], int2: bool) -> tuple[bytes, frozenset[str]]:
        uniform = Allocation(layers, ("int2-channel" if int2 else "int8-channel",) * len(layers))
        graph, names = _trace(model, uniform, inputs, int2)
        return graph.SerializeToString(), frozenset(names)

    def trace(allocation: Allocation) -> tuple[Any, set[str]]:
        import onnx

        content, names = traced(allocation.layers, _has_int2(allocation))
        return onnx.ModelProto.FromString(content), set(names)

    return partial(file_size, model, inputs=inputs, trace=trace)


def _has_int2(allocation: Allocation) -> bool:
    return any(needs_int2(layer, allocation.scheme_of[layer.name]) for layer in allocation.layers)


def _refuse(allocation: Allocation, inputs: Any, ranges: Ranges | None, sized: bool = False) -> None:
    """Checks before any work."""
    if not isinstance(inputs, Tensor | tuple):
        raise MpqError("ONNX export traces the model: pass the inputs it is called with, a tensor or a tuple (inputs=)")
    check(TARGETS["onnx"], allocation)
    for layer in allocation.layers:
        activation = allocation.scheme_of[layer.name].activation
        if not sized and activation is not None and layer.name not in (ranges or {}):
            raise MpqError(
                f"layer {layer.name} has {activation.name} activations: pass the ranges of its inputs (ranges=...)"
            )


def _kept(layers: Layers, matrices: dict[str, Tensor]) -> Layers:
    """The layers unchanged; their rounded weights are recorded by name."""
    for layer, scheme, quantized in layers:
        matrices[layer.name] = dequantize(quantized)
        yield layer, scheme, quantized


def _tensor_bytes(traced: Any, allocation: Allocation) -> int:
    return allocation.size + sum(len(tensor.raw_data) for tensor in traced.graph.initializer)


def _fill(graph: Graph, model: nn.Module, layers: Layers, names: set[str], ranges: Ranges | None) -> Graph:
    """Put every layer's weight into the graph and round its inputs."""
    for tensor in list(graph.graph.initializer):
        if graph.data is not None:
            graph.graph.initializer.remove(tensor)
            content = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8) if tensor.raw_data else None
            graph.store(tensor.name, tensor.data_type, tensor.dims, torch.empty(0) if content is None else content)
    for layer, scheme, quantized in layers:
        name, *shared = [f"{name}.weight" for name in layer.names if f"{name}.weight" in names] or [""]
        if not name:
            raise MpqError(f"the traced graph has no weight of layer {layer.name}: the model does not use it")
        block = 0 if shared else nbits_block(layer, scheme)
        products = products_with(graph, name, layer.kind == "transformers-conv1d") if block else []
        if products:
            put_products(graph, quantized, name, block, products)
            drop_unused(graph, name)
        else:
            weight: Tensor = model.get_submodule(layer.name).weight  # type: ignore[assignment]
            put_weight(graph, layer, quantized, name, list(weight.shape))
            for other in shared:
                graph.make("Identity", [name], other)
        if scheme.activation is not None:
            assert ranges is not None
            round_inputs(graph, name, scheme.activation, ranges[layer.name])
    graph.finish()
    return graph


def _trace(model: nn.Module, allocation: Allocation, inputs: Any, int2: bool | None = None) -> tuple[Any, set[str]]:
    """The model's graph without the weights of the layers, and the names under which it uses them."""
    check_packages(TARGETS["onnx"])
    import onnx_ir

    inputs = tuple(map(_two_samples, inputs if isinstance(inputs, tuple) else (inputs,)))
    int2 = _has_int2(allocation) if int2 is None else int2
    with evaluating(model), without_cache(model), _without_remarks():
        try:
            program: Any = torch.onnx.export(
                model, inputs, dynamo=True, optimize=False, dynamic_shapes=tuple(map(_open_sizes, inputs)),
                opset_version=OPSET_INT2 if int2 else OPSET, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            why = first_line(error.__cause__ or error)
            raise MpqError(
                f"torch cannot export {type(model).__name__} as a graph ({why}): export to mpq instead"
            ) from error
    weights = {f"{name}.weight" for layer in allocation.layers for name in layer.names}
    stored = program.model.graph.initializers
    for name in weights & set(stored):
        stored.pop(name).const_value = None  # otherwise the optimizer folds it into new constants
    program.optimize()
    traced = _stripped(onnx_ir.to_proto(program.model))
    traced.opset_import.add(domain="com.microsoft", version=1)
    return traced, weights & {name for node in traced.graph.node for name in node.input}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A language model of transformers returns logits alone inside the block, without keys and values."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Suppress the tracer's log about its own code and missing packages."""
    tracer = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = tracer.level
    tracer.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        tracer.setLevel(before)


def _two_samples(part: Any) -> Any:
    """An input whose batch is not of one sample: the tracer takes sizes of one for constants."""
    return part.repeat_interleave(2, 0) if isinstance(part, Tensor) and part.ndim and len(part) == 1 else part


def _open_sizes(part: Any) -> dict[int, Any] | None:
    """The dynamic dimensions of an input: the batch, and the number of tokens."""
    if not isinstance(part, Tensor) or not part.ndim:
        return None
    tokens = part.ndim == 2 and not part.is_floating_point()
    return {0: torch.export.Dim("batch"), **({1: torch.export.Dim.AUTO} if tokens else {})}


def _stripped(traced: Any) -> Any:
    """The graph without the tracer's metadata (stack traces, shapes of values), which outweighs a small network."""
    graph = traced.graph
    for part in (traced, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *traced.functions):
        for field in ("metadata_props", "doc_string", "value_info"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    return traced
