"""Verification of an ONNX graph: weights read by us, outputs by ONNX Runtime, or by onnx's own evaluator where
that is not installed.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, first_line
from mpq.exporters.onnx.evaluator import nbits_matrix, reference_outputs
from mpq.exporters.verify import result_tensors, runner, same_numbers
from mpq.network.ranges import Ranges
from mpq.quantized import checked_layers, simulate_rounded

log = logging.getLogger(__name__)

ROOM = 1e-3  # relative to the largest output: float32 sums in another order, through all layers
ROOM_ROUNDED = 0.1  # relative error of all outputs where inputs are rounded: sums in another order change some codes


def read_back(
    file: Path,
    model: nn.Module,
    allocation: Allocation,
    matrices: Mapping[str, Tensor],  # rounded float32 (rows, cols), by layer name
    inputs: tuple[Any, ...],
    ranges: Ranges | None,
) -> None:
    """Compare a graph that was written with the simulated model.

    Raises:
        MpqError: a layer holds other numbers, named, or the outputs on `inputs` differ.
    """
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    users = {name: node for node in graph.node for name in node.input if name.endswith(".codes")}
    for name, matrix in matrices.items():
        weight = next(f"{one}.weight" for one in _names(allocation, name) if _codes_name(f"{one}.weight", stored))
        same_numbers(name, _numbers(weight, stored, users, file.parent), matrix)
    rounded = [(layer, scheme, matrices[layer.name]) for layer, scheme in checked_layers(model, allocation)]
    simulated = simulate_rounded(model, rounded, ranges)
    expected = result_tensors(runner(inputs), simulated)
    plain = all(scheme.activation is None for _, scheme, _ in rounded)
    reader, actual = _outputs(file, inputs)
    for one, other in zip(expected, actual, strict=False):
        _compare(reader, one.double(), other.double(), plain)


def _names(allocation: Allocation, name: str) -> tuple[str, ...]:
    return next(layer.names for layer in allocation.layers if layer.name == name)


def _codes_name(weight: str, stored: Mapping[str, Any]) -> str:
    return next((name for name in (f"{weight}.codes", f"{weight}.copy") if name in stored), "")


def _numbers(weight: str, stored: Mapping[str, Any], users: Mapping[str, Any], folder: Path) -> Tensor:
    """The weight's float32 numbers, (rows, cols), by the definitions of DequantizeLinear and MatMulNBits."""
    name = _codes_name(weight, stored)
    codes = _array(stored[name], folder)
    if name.endswith(".copy"):
        return codes
    scales = _array(stored[f"{weight}.scale"], folder)
    zeros = (
        _array(stored[f"{weight}.zeros"], folder)
        if f"{weight}.zeros" in stored
        else torch.tensor(0.0, dtype=torch.float32)
    )
    user = users[name]
    values = {attribute.name: int(attribute.i) for attribute in user.attribute}
    if user.op_type == "MatMulNBits":
        codes, zeros = nbits_matrix(codes, zeros, values)
    size = values.get("block_size", 0)
    return (codes - _repeated(zeros, codes, size)) * _repeated(scales, codes, size)


def _repeated(parameter: Tensor, codes: Tensor, block: int) -> Tensor:
    """Scales or zero points for each number: of the tensor, of the channels, or of the blocks of each channel."""
    if parameter.ndim < 2 or parameter.shape[1] == 1:
        return parameter.reshape(-1, 1)
    return parameter.repeat_interleave(block, 1)[:, : codes.shape[1]]


def _array(tensor: Any, folder: Path) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(np.asarray(numpy_helper.to_array(tensor, str(folder))).astype(np.float32))


def _outputs(file: Path, inputs: tuple[Any, ...]) -> tuple[str, list[Tensor]]:
    """The graph's runner and its outputs; none, with a warning in the log, where an operator is missing."""
    if find_spec("onnxruntime") is not None and (outputs := _runtime_outputs(file, inputs)) is not None:
        return "ONNX Runtime", outputs
    try:
        return "onnx's reference evaluator", reference_outputs(file, inputs)
    except Exception as error:  # onnx's own, of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "the graph's weights were checked, its outputs were not: onnx's reference evaluator does not run it (%s); "
            "install onnxruntime to compare them",
            reason,
        )
        return "", []


def _runtime_outputs(file: Path, inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """ONNX Runtime's outputs, without optimizations that round once more; None where it lacks an operator."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    given = [part.detach().numpy() for part in inputs if isinstance(part, Tensor)]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        return [torch.from_numpy(part) for part in session.run(None, dict(zip(names, given, strict=True)))]
    except Exception as error:  # ONNX Runtime's own, of many kinds
        if type(error).__name__ == "NotImplemented":
            log.warning(
                "the installed ONNX Runtime lacks an operator of the graph: onnx's own evaluator runs it instead"
            )
            return None
        raise MpqError(f"ONNX Runtime does not run the graph ({first_line(error)}): nothing was written") from error


def _compare(reader: str, expected: Tensor, actual: Tensor, plain: bool) -> None:
    if expected.shape != actual.shape:
        raise MpqError(f"the graph gives {tuple(actual.shape)} where the model gives {tuple(expected.shape)}")
    error = (actual - expected).nan_to_num(nan=0.0)
    off = bool((actual.isnan() != expected.isnan()).any())
    if plain:
        off |= bool((error.abs() > ROOM * expected.abs().nan_to_num().max() + 1e-6).any()) if error.numel() else False
    else:
        off |= bool(error.norm() > ROOM_ROUNDED * expected.nan_to_num().norm() + 1e-6)
    if off:
        raise MpqError(
            f"{reader}'s outputs differ from the simulated model's (by up to {error.abs().max():.2g}): "
            "nothing was written"
        )
