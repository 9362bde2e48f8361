"""An integer program as an ONNX graph of integer operators, which ONNX Runtime computes to the bit.

Codes are stored as uint8 with a zero point, weights as uint8 with the zero point 128: products of two unsigned bytes
are exact on every processor, where signed by unsigned ones saturate on some. Shifts are divisions of what was made
positive, since ONNX shifts unsigned integers only and divides towards zero.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.core.files import write_atomically
from mpq.exporters.holding import check_packages
from mpq.exporters.targets import TARGETS
from mpq.integer_only.program import HEADROOM, IntegerProgram, Step

OPSET = 21
WEIGHT_OFFSET = 128


def export_integer(program: IntegerProgram, path: str | os.PathLike[str], sample: Tensor) -> Path:
    """Write the graph: `codes`, uint8 like the codes of `sample` (batch, ...) plus their offset, to int32 `outputs`.

    The scales of codes and outputs, and the offset, are in the file's metadata.

    Raises:
        MpqError: the package onnx is missing.
    """
    check_packages(TARGETS["onnx"])
    from onnx import TensorProto, helper

    graph = _Graph(program)
    for step in program.steps:
        WRITERS[step.operation](graph, step)
    shape = ["batch", *sample.shape[1:]]
    made = helper.make_graph(
        [*graph.nodes, helper.make_node("Cast", [program.output], ["outputs.int32"], to=TensorProto.INT32)],
        "integers",
        [helper.make_tensor_value_info(program.input, TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("outputs.int32", TensorProto.INT32, None)],
        graph.constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    facts = {"input_scale": program.input_scale, "input_offset": program.offsets[program.input],
             "output_scale": program.output_scale}  # fmt: skip
    helper.set_model_props(model, {name: repr(value) for name, value in facts.items()})
    path = Path(path)
    with write_atomically(path) as draft:
        draft.write_bytes(model.SerializeToString())
    return path


class _Graph:
    def __init__(self, program: IntegerProgram) -> None:
        self.program, self.nodes, self.constants = program, list[Any](), list[Any]()
        self.makers = {step.output: step for step in program.steps}

    def constant(self, name: str, values: Any, kind: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def offset(self, name: str) -> str:
        """The zero point of stored codes, uint8."""
        return self.constant(f"{name}.zero.{len(self.constants)}", self.program.offsets[name], np.uint8)

    def cast(self, name: str, kind: str) -> str:
        from onnx import TensorProto

        return self.node("Cast", [name], f"{name}.{kind.lower()}.{len(self.nodes)}", to=getattr(TensorProto, kind))

    def signed(self, name: str) -> str:
        """Integers as int64: stored codes without their offset, sums as they are."""
        wide = self.cast(name, "INT64")
        if not self.program.offsets.get(name):
            return wide
        offset = self.constant(f"{wide}.offset", self.program.offsets[name], np.int64)
        return self.node("Sub", [wide, offset], f"{wide}.signed")


def _layer(graph: _Graph, step: Step) -> None:
    weight, bias, (source,) = step.values["weight"], step.values["bias"], step.inputs
    is_conv = step.operation == "conv"
    stored = weight + WEIGHT_OFFSET if is_conv else weight.t() + WEIGHT_OFFSET
    inputs = [
        source, graph.constant(f"{step.output}.weight", stored.numpy(), np.uint8), graph.offset(source),
        graph.constant(f"{step.output}.weight.zero", WEIGHT_OFFSET, np.uint8),
    ]  # fmt: skip
    if is_conv:
        values = step.values
        graph.node(
            "ConvInteger", inputs, f"{step.output}.product", strides=values["stride"], dilations=values["dilation"],
            pads=[*values["padding"], *values["padding"]], group=values["groups"],
        )  # fmt: skip
    else:
        graph.node("MatMulInteger", inputs, f"{step.output}.product")
    shape = (1, -1, *(1,) * (weight.ndim - 2))
    added = graph.constant(f"{step.output}.bias", bias.view(shape).numpy(), np.int32)
    graph.node("Add", [f"{step.output}.product", added], step.output)


def _rescale(graph: _Graph, step: Step) -> None:
    values, name = step.values, step.output
    dims = _dims(graph.makers, step)
    products = []
    for i, (term, multiplier) in enumerate(zip(step.inputs, values["multipliers"], strict=True)):
        shape = (1, -1, *(1,) * (dims - 2))
        held = graph.constant(f"{name}.multiplier.{i}", multiplier.view(shape).numpy(), np.int64)
        products.append(graph.node("Mul", [graph.signed(term), held], f"{name}.product.{i}"))
    total = products[0]
    for i, product in enumerate(products[1:]):
        total = graph.node("Add", [total, product], f"{name}.total.{i}")
    shift = values["shift"]
    above = 2 ** (HEADROOM + 1)  # a multiple of the divisor, so that the quotient is rounded down
    half = graph.constant(f"{name}.half", above + (1 << shift >> 1), np.int64)
    divided = graph.node(
        "Div",
        [graph.node("Add", [total, half], f"{name}.positive"), graph.constant(f"{name}.divisor", 1 << shift, np.int64)],
        f"{name}.quotient",
    )
    offset = graph.program.offsets[name]
    moved = graph.node(
        "Sub", [divided, graph.constant(f"{name}.above", (above >> shift) - offset, np.int64)], f"{name}.moved"
    )
    bounds = [graph.constant(f"{name}.{side}", values[side] + offset, np.int64) for side in ("low", "high")]
    is_output = name == graph.program.output
    clipped = graph.node("Clip", [moved, *bounds], name if is_output else f"{name}.clipped")
    if not is_output:
        from onnx import TensorProto

        graph.node("Cast", [clipped], name, to=TensorProto.UINT8)


def _dims(makers: Mapping[str, Step], step: Step) -> int:
    """Dimensions of a rescaled value, from the operation of its first term."""
    maker = makers.get(step.inputs[0])
    while maker is not None:
        if maker.operation in ("conv", "linear"):
            return int(maker.values["weight"].ndim)
        if maker.operation == "flatten" or (maker.operation == "sum" and not maker.values["keepdim"]):
            return 2
        maker = makers.get(maker.inputs[0])
    return 4


def _pad(graph: _Graph, step: Step) -> None:
    sides = step.values["sides"]
    pairs = [(sides[i], sides[i + 1]) for i in range(0, len(sides), 2)]  # last dimension first
    axes = graph.constant(f"{step.output}.axes", [-1 - i for i in range(len(pairs))], np.int64)
    flat = [low for low, _ in pairs] + [high for _, high in pairs]
    held = graph.constant(f"{step.output}.sides", flat, np.int64)
    graph.node("Pad", [step.inputs[0], held, graph.offset(step.inputs[0]), axes], step.output)


def _slice(graph: _Graph, step: Step) -> None:
    names = {"starts": "start", "ends": "end", "axes": "dim", "steps": "step"}
    held = [graph.constant(f"{step.output}.{name}", [step.values[key]], np.int64) for name, key in names.items()]
    graph.node("Slice", [step.inputs[0], *held], step.output)


def _sum(graph: _Graph, step: Step) -> None:
    axes = graph.constant(f"{step.output}.axes", step.values["dims"], np.int64)
    graph.node("ReduceSum", [graph.signed(step.inputs[0]), axes], step.output, keepdims=int(step.values["keepdim"]))


def _maxpool(graph: _Graph, step: Step) -> None:
    values = step.values
    graph.node(
        "MaxPool", list(step.inputs), step.output, kernel_shape=values["kernel_size"], strides=values["stride"],
        pads=[*values["padding"], *values["padding"]], dilations=values["dilation"],
    )  # fmt: skip


WRITERS: dict[str, Callable[[_Graph, Step], Any]] = {
    "conv": _layer, "linear": _layer, "rescale": _rescale, "pad": _pad, "slice": _slice, "sum": _sum,
    "maxpool": _maxpool, "flatten": lambda graph, step: graph.node("Flatten", list(step.inputs), step.output, axis=1),
}  # fmt: skip


def run_onnx(path: str | os.PathLike[str], program: IntegerProgram, codes: Tensor) -> Tensor:
    """Output codes of input codes by ONNX Runtime, int64 both, as `mpq.integer_only.run`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    stored = (codes + program.offsets[program.input]).to(torch.uint8).numpy()
    (outputs,) = session.run(None, {program.input: stored})
    return torch.from_numpy(outputs).long()
