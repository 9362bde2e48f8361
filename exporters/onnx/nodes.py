"""The parts of an ONNX graph that an allocation changes: stored weights, products and rounded inputs."""

from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.kernels.layout import pack_bits
from mpq.network.ranges import static_scale
from mpq.rounding.codes import encode_scales
from mpq.rounding.reference import Quantized

ALIGNMENT = 4096  # bytes; tensors in a separate file can then be memory-mapped
SMALL = 1024  # bytes of a tensor that stays in the graph


class Graph:
    """A traced graph whose stored tensors are added one at a time, in it or in a file beside it."""

    def __init__(self, model: Any, data: BinaryIO | None = None, location: str = "") -> None:
        self.model, self.graph = model, model.graph
        self.data, self.location, self.end = data, location, 0
        self.front: list[Any] = []  # nodes that make weights: before all others

    def store(self, name: str, kind: int, shape: Iterable[int], content: Tensor) -> str:
        """Add a stored tensor; its name."""
        from onnx import TensorProto

        raw = content.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        tensor = TensorProto(name=name, data_type=kind, dims=list(shape))
        if self.data is None or len(raw) < SMALL:
            tensor.raw_data = raw
        else:
            start = -(-self.end // ALIGNMENT) * ALIGNMENT
            self.data.write(bytes(start - self.end) + raw)
            self.end = start + len(raw)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self.location), ("offset", start), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
        self.graph.initializer.append(tensor)
        return name

    def make(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node that makes a weight; the name of its output."""
        from onnx import helper

        self.front.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def finish(self) -> Any:
        """The whole model, nodes in order."""
        nodes = [*self.front, *self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self.front = []
        return self.model

    def __contains__(self, value: object) -> bool:
        return any(value in node.input for node in self.graph.node) or any(
            value == out.name for out in self.graph.output
        )


def put_weight(graph: Graph, layer: Layer, quantized: Quantized, name: str, shape: list[int]) -> None:
    """Store a weight and dequantize it in the graph: `name` is then the float weight of the given shape."""
    from onnx import TensorProto

    (rows, cols), format = quantized.shape, quantized.format
    made = f"{name}.matrix"
    if format.is_float_copy:
        copy = graph.store(f"{name}.copy", _floats(format.grid.name), [rows, cols], quantized.codes)
        graph.make("Cast", [copy], made, to=TensorProto.FLOAT)
    else:
        kind, stored = _codes(quantized.codes, quantized)
        inputs = [graph.store(f"{name}.codes", kind, [rows, cols], stored), _scale(graph, name, quantized)]
        by_group = format.granularity == "group"
        if quantized.zeros is not None:
            zeros = _codes(quantized.zeros, quantized)[1]
            inputs.append(graph.store(f"{name}.zeros", kind, _scale_shape(quantized), zeros))
        blocks: dict[str, int] = {"axis": 1, "block_size": format.group_size} if by_group else {"axis": 0}
        graph.make("DequantizeLinear", inputs, made, **blocks)
    if layer.kind == "transformers-conv1d":
        graph.make("Transpose", [made], name, perm=[1, 0])
    elif shape == [rows, cols]:
        graph.front[-1].output[0] = name
    else:
        graph.make(
            "Reshape", [made, graph.store(f"{name}.shape", TensorProto.INT64, [len(shape)], torch.tensor(shape))], name
        )


def put_products(graph: Graph, quantized: Quantized, name: str, block: int, products: list[tuple[Any, bool]]) -> None:
    """Store a weight in MatMulNBits' layout, and replace the products with the weight by it."""
    from onnx import TensorProto, helper

    (rows, cols), format = quantized.shape, quantized.format
    bits, blocks = format.grid.bits, -(-cols // block)
    padded = torch.nn.functional.pad(quantized.codes, (0, blocks * block - cols))
    codes = pack_bits(padded.reshape(rows * blocks, block), bits)
    inputs = [graph.store(f"{name}.codes", TensorProto.UINT8, [rows, blocks, block * bits // 8], codes)]
    scale = _scale(graph, name, quantized, whole=True)
    if format.granularity != "group":
        size = graph.store(f"{name}.blocks", TensorProto.INT64, [2], torch.tensor([rows, blocks]))
        scale = graph.make("Expand", [scale, size], f"{name}.scales")
    inputs.append(scale)
    if quantized.zeros is not None:
        zeros = pack_bits(quantized.zeros, bits)
        inputs.append(graph.store(f"{name}.zeros", TensorProto.UINT8, zeros.shape, zeros))
    for node, biased in products:
        index = list(graph.graph.node).index(node)
        output, bias = node.output[0], node.input[2] if biased else ""
        product = helper.make_node(
            "MatMulNBits", [node.input[0], *inputs], [f"{output}.product" if bias else output], domain="com.microsoft",
            K=cols, N=rows, bits=bits, block_size=block,
        )  # fmt: skip
        graph.graph.node.remove(node)
        if bias:
            graph.graph.node.insert(index, helper.make_node("Add", [product.output[0], bias], [output]))
        graph.graph.node.insert(index, product)


def products_with(graph: Graph, weight: str, transposed: bool) -> list[tuple[Any, bool]]:
    """The products x @ W.T with a weight, each with whether it adds a bias; none when it is used in any other way.

    `transposed` says that the weight is stored as (in, out).
    """
    products: list[tuple[Any, bool]] = []
    for node in graph.graph.node:
        if weight not in node.input:
            continue
        if node.op_type == "Transpose" and not transposed:
            turned = products_with(graph, node.output[0], True)
            if not turned or any(product.op_type != "MatMul" for product, _ in turned):
                return []
            products += turned
        elif list(node.input).index(weight) != 1:
            return []
        elif node.op_type == "MatMul" and transposed:
            products.append((node, False))
        elif node.op_type == "Gemm" and _is_plain(node, transposed):
            products.append((node, len(node.input) == 3))
        else:
            return []
    return [] if any(weight == output.name for output in graph.graph.output) else products


def _is_plain(gemm: Any, transposed: bool) -> bool:
    attributes = {attribute.name: attribute.i or attribute.f for attribute in gemm.attribute}
    plain = (attributes.get("alpha", 1.0), attributes.get("beta", 1.0), attributes.get("transA", 0)) == (1.0, 1.0, 0)
    return plain and bool(attributes.get("transB", 0)) != transposed


def drop_unused(graph: Graph, weight: str) -> None:
    """Remove the transpositions of a weight that nothing uses any more."""
    for node in [node for node in graph.graph.node if weight in node.input]:
        if node.op_type == "Transpose" and node.output[0] not in graph:
            graph.graph.node.remove(node)


def round_inputs(graph: Graph, weight: str, format: Format, span: tuple[float, float]) -> None:
    """Put a QDQ pair before every product with a weight: one static scale, no zero point."""
    from onnx import TensorProto, helper

    reached, rounded = {weight}, dict[str, str]()
    parameters, options = [f"{weight}.input.scale"], dict[str, Any]()
    if format.grid.family == "int":
        parameters.append(graph.store(f"{weight}.input.zero", TensorProto.INT8, [], torch.zeros(1, dtype=torch.uint8)))
    else:  # ONNX Runtime takes a zero point in fp8 for the smallest code, and drops a Relu before it
        options["output_dtype"] = TensorProto.FLOAT8E4M3FN
    for node in list(graph.graph.node):
        if not reached & set(node.input):
            continue
        if node.op_type in ("Transpose", "Reshape", "Cast"):
            reached.update(node.output)
        elif node.op_type in ("Conv", "MatMul", "Gemm"):
            source = node.input[0]
            if source not in rounded:
                base = rounded[source] = f"{weight}.input.{len(rounded)}"
                pair = [
                    helper.make_node("QuantizeLinear", [source, *parameters], [f"{base}.codes"], **options),
                    helper.make_node("DequantizeLinear", [f"{base}.codes", *parameters], [base]),
                ]
                index = list(graph.graph.node).index(node)
                for offset, extra in enumerate(pair):
                    graph.graph.node.insert(index + offset, extra)
            node.input[0] = rounded[source]
    if not rounded:
        raise MpqError(f"no product with {weight} was found in the graph: leave its activations in floating point")
    graph.store(parameters[0], TensorProto.FLOAT, [], torch.tensor([static_scale(format, span)], dtype=torch.float32))


def _scale(graph: Graph, name: str, quantized: Quantized, whole: bool = False) -> str:
    """Store the scales in their own type; the name of the float scales, a matrix when `whole`."""
    from onnx import TensorProto

    assert quantized.scales is not None
    scales, type = quantized.scales, quantized.format.scale
    shape = list(scales.shape) if whole else _scale_shape(quantized)
    stored = graph.store(f"{name}.scale", _floats(type), shape, encode_scales(scales, type))
    return stored if type == "fp32" else graph.make("Cast", [stored], f"{name}.scale.float", to=TensorProto.FLOAT)


def _scale_shape(quantized: Quantized) -> list[int]:
    assert quantized.scales is not None
    rows, groups = quantized.scales.shape
    return {"group": [rows, groups], "channel": [rows], "tensor": []}[quantized.format.granularity]


def _floats(name: str) -> int:
    from onnx import TensorProto

    kinds = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
    return int(kinds[name])


def _codes(codes: Tensor, quantized: Quantized) -> tuple[int, Tensor]:
    """ONNX's type of the codes, and their bytes: two's complement where signed, narrow ones in one bit stream."""
    from onnx import TensorProto

    grid = quantized.format.grid
    if grid.family == "float":
        return {"e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}[grid.name], codes
    signed = codes ^ grid.offset
    kind = int(TensorProto.DataType.Value(f"{'' if grid.signed else 'U'}INT{grid.bits}"))
    return kind, signed if grid.bits == 8 else pack_bits(signed.reshape(1, -1), grid.bits)
