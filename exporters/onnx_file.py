"""ONNX: weights as DequantizeLinear of integers or fp8 at each layer's own width, activations as static QDQ pairs.

The graph is torch's own export of the model; only the weights and the inputs of the layers are changed (ONNX operator
set 21: DequantizeLinear with blocks, 4-bit integers).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.rounding import Quantized, encode_scales
from mpq.exporters.consumers import CONSUMERS, check
from mpq.exporters.folder import refuse_foreign, write_checksums, write_folder
from mpq.exporters.ranges import Ranges
from mpq.kernels.layout import pack_bits
from mpq.quantized import Moments, quantized_layers

FILE, OPSET = "model.onnx", 21


def export(
    model: nn.Module,
    allocation: Allocation,
    folder: str | os.PathLike[str],
    *,
    method: str = "mse",
    second_moments: Moments | None = None,
    recipe: Mapping[str, Any] | None = None,
    inputs: Tensor | tuple[Any, ...] | None = None,
    ranges: Ranges | None = None,
) -> Path:
    """Write `model.onnx`; the folder.

    Args:
        model: on the CPU, in float32; the others are as in `mpq.exporters.checkpoint.export`.
        recipe: not needed, the graph is the model.
        inputs: what the model is called with; the first dimension of each tensor is left open.
        ranges: of the layers' inputs (`mpq.exporters.ranges.input_ranges`), for schemes with int8 activations.

    Raises:
        MpqError: a scheme that ONNX cannot hold, no inputs, no range for a layer that needs one, a missing package.
    """
    if inputs is None:
        raise MpqError("ONNX export traces the model: pass the inputs it is called with (inputs=...)")
    check(CONSUMERS["onnx"], allocation)
    for layer in allocation.layers:
        if allocation.scheme_of[layer.name].activation is not None and layer.name not in (ranges or {}):
            raise MpqError(f"layer {layer.name} has int8 activations: pass the ranges of its inputs (ranges=...)")
    refuse_foreign(folder, (FILE, "allocation.json"))
    graph_of = _trace(model, inputs if isinstance(inputs, tuple) else (inputs,))
    graph = graph_of.graph
    weights = {initializer.name: initializer for initializer in graph.initializer}
    nodes: list[Any] = []
    for layer, scheme, quantized in quantized_layers(model, allocation, method, second_moments):
        found = [f"{name}.weight" for name in layer.names if f"{name}.weight" in weights]
        if not found:
            raise MpqError(f"the traced graph has no weight of layer {layer.name}: the model does not use it")
        name, *shared = found
        shape = list(weights[name].dims)
        for weight in found:
            graph.initializer.remove(weights[weight])
        nodes += _weight_nodes(graph, layer, quantized, name, shape)
        nodes += _copies(name, shared)
        if scheme.activation is not None:
            _round_input(graph, name, (ranges or {})[layer.name])
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)
    with write_folder(folder) as draft:
        (draft / FILE).write_bytes(graph_of.SerializeToString())
        allocation.save(draft / "allocation.json")
        write_checksums(draft, {})
    return Path(folder)


def _trace(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MpqError("ONNX files are written with onnx and onnxscript: pip install 'mpq[onnx]'") from error
    batch = torch.export.Dim("batch")
    open_batch = tuple({0: batch} if isinstance(part, Tensor) and part.ndim else None for part in inputs)
    training = model.training
    model.eval()
    try:
        program: Any = torch.onnx.export(
            model, inputs, dynamo=True, optimize=False, dynamic_shapes=open_batch, opset_version=OPSET, verbose=False
        )
    finally:
        model.train(training)
    return _stripped(program.model_proto)


def _stripped(traced: Any) -> Any:
    """The graph without what the tracer notes of its own work (stack traces, shapes of values): more than the weights
    of a small network.
    """
    graph = traced.graph
    for part in (traced, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *traced.functions):
        for field in ("metadata_props", "doc_string", "value_info"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    return traced


def _copies(name: str, others: list[str]) -> list[Any]:
    from onnx import helper

    return [helper.make_node("Identity", [name], [other]) for other in others]


def _weight_nodes(graph: Any, layer: Layer, quantized: Quantized, name: str, shape: list[int]) -> list[Any]:
    """Add the stored tensors of a weight to the graph, and give the nodes that make the float weight of them."""
    from onnx import TensorProto, helper

    (rows, cols), format = quantized.shape, quantized.format
    floats = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
    transposed = layer.kind == "transformers-conv1d"
    made = f"{name}.matrix"
    if format.is_float_copy:
        _store(graph, f"{name}.copy", floats[format.grid.name], [rows, cols], quantized.codes)
        nodes = [helper.make_node("Cast", [f"{name}.copy"], [made], to=TensorProto.FLOAT)]
    else:
        assert quantized.scales is not None
        kind, stored = _codes(quantized.codes, quantized)
        by_group = format.granularity == "group"
        scale_shape = list(quantized.scales.shape) if by_group else [] if format.granularity == "tensor" else [rows]
        _store(graph, f"{name}.codes", kind, [rows, cols], stored)
        _store(graph, f"{name}.scale", floats[format.scale], scale_shape, encode_scales(quantized.scales, format.scale))
        inputs = [f"{name}.codes", f"{name}.scale.float"]
        if quantized.zeros is not None:
            _store(graph, f"{name}.zeros", kind, scale_shape, _codes(quantized.zeros, quantized)[1])
            inputs.append(f"{name}.zeros")
        options: Any = {"axis": 1, "block_size": format.group_size} if by_group else {"axis": 0}
        nodes = [
            helper.make_node("Cast", [f"{name}.scale"], [f"{name}.scale.float"], to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", inputs, [made], **options),
        ]
    if transposed:
        return [*nodes, helper.make_node("Transpose", [made], [name], perm=[1, 0])]
    _store(graph, f"{name}.shape", TensorProto.INT64, [len(shape)], torch.tensor(shape))
    return [*nodes, helper.make_node("Reshape", [made, f"{name}.shape"], [name])]


def _codes(codes: Tensor, quantized: Quantized) -> tuple[int, Tensor]:
    """ONNX's type of the codes, and their bytes: two's complement where signed, two of 4 bits in a byte."""
    from onnx import TensorProto

    grid = quantized.format.grid
    if grid.family == "float":
        return TensorProto.FLOAT8E4M3FN, codes
    signed = codes ^ grid.offset
    if grid.bits == 4:
        return TensorProto.INT4 if grid.signed else TensorProto.UINT4, pack_bits(signed.reshape(1, -1), 4)
    if grid.signed:
        return TensorProto.INT8, signed
    return TensorProto.UINT8, signed


def _store(graph: Any, name: str, kind: int, shape: list[int], content: Tensor) -> None:
    from onnx import TensorProto

    raw = content.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    graph.initializer.append(TensorProto(name=name, data_type=kind, dims=shape, raw_data=raw))


def _round_input(graph: Any, weight: str, span: tuple[float, float]) -> None:
    """Put a QDQ pair before the node that multiplies by a weight: int8, one scale, no zero point."""
    from onnx import TensorProto, helper

    reached = {weight}
    for index, node in enumerate(graph.node):
        if not reached & set(node.input):
            continue
        if node.op_type in ("Transpose", "Reshape", "Cast"):
            reached.update(node.output)
        elif node.op_type in ("Conv", "MatMul", "Gemm"):
            scale = max(map(abs, span)) / 127 or 1.0
            base = f"{weight}.input"
            _store(graph, f"{base}.scale", TensorProto.FLOAT, [], torch.tensor([scale]))
            _store(graph, f"{base}.zero", TensorProto.INT8, [], torch.zeros(1, dtype=torch.int8))
            facts = [f"{base}.scale", f"{base}.zero"]
            pair = [
                helper.make_node("QuantizeLinear", [node.input[0], *facts], [f"{base}.codes"]),
                helper.make_node("DequantizeLinear", [f"{base}.codes", *facts], [f"{base}.rounded"]),
            ]
            node.input[0] = f"{base}.rounded"
            for offset, extra in enumerate(pair):
                graph.node.insert(index + offset, extra)
            return
    raise MpqError(f"no product with {weight} was found in the graph: leave its activations in floating point")
