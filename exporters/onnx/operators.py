"""The operator of ONNX Runtime for a layer's weight, determined without its values."""

from functools import lru_cache

from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme

LINEAR = ("linear", "transformers-conv1d")
LARGEST_BLOCK = 256  # limit of MatMulNBits in 2 bits; 4 and 8 bits allow more
OPSET, OPSET_INT2 = 21, 25  # blocks and 4-bit integers came with 21, 2-bit integers with 25


def nbits_block(layer: Layer, scheme: Scheme) -> int:
    """The block size in which `com.microsoft.MatMulNBits` takes the weight, 0 when it does not.

    It multiplies floats by integers of 2, 4 or 8 bits in blocks of a power of two from 16 on; a row's last block may be
    short. A scale of a channel or a tensor is repeated for every block when the graph is loaded. A weight that an
    embedding shares is stored once and cannot be in its layout.
    """
    weight = scheme.weight
    if layer.kind not in LINEAR or scheme.activation is not None:
        return 0
    if weight.grid.family != "int" or weight.grid.bits not in (2, 4, 8) or weight.zero_point == weight.grid.signed:
        return 0
    if weight.granularity == "group":
        size = weight.group_size
        return size if 16 <= size <= LARGEST_BLOCK and size & (size - 1) == 0 else 0
    block = min(layer.cols & -layer.cols, LARGEST_BLOCK)  # the largest power of two that divides a row
    return block if block >= 16 and not weight.zero_point else 0


def needs_int2(layer: Layer, scheme: Scheme) -> bool:
    """Whether the weight is stored as a tensor of 2-bit integers."""
    return _is_int2(scheme.weight) and not nbits_block(layer, scheme)


def _is_int2(weight: Format) -> bool:
    return weight.grid.family == "int" and weight.grid.bits == 2


@lru_cache(maxsize=1)
def has_int2() -> bool:
    """Whether the installed onnx writes tensors of 2-bit integers and the installed onnxruntime, if any, reads them."""
    try:
        import onnx
    except ImportError:
        return True  # no ONNX files can be written
    if not hasattr(onnx.TensorProto, "INT2") or onnx.defs.onnx_opset_version() < OPSET_INT2:
        return False
    try:
        import onnxruntime
    except ImportError:
        return True
    helper, kinds = onnx.helper, onnx.TensorProto
    stored = [
        kinds(name="codes", data_type=kinds.INT2, dims=[4], raw_data=b"\x1b"),
        kinds(name="scale", data_type=kinds.FLOAT, dims=[], raw_data=b"\x00\x00\x80\x3f"),
    ]
    node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["out"])
    out = helper.make_tensor_value_info("out", kinds.FLOAT, [4])
    opset = [helper.make_opsetid("", OPSET_INT2)]
    model = helper.make_model(helper.make_graph([node], "int2", [], [out], stored), opset_imports=opset, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # any error of the runtime about an unknown type
        return False
    return True
