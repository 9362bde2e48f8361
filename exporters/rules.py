"""Rules of each kind of file: the objection to a layer's scheme in half a sentence, or ""."""

from typing import Any

from mpq.core.formats import Format, parse_format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.exporters.onnx.operators import has_int2, needs_int2


def compressed_tensors_format(scheme: Scheme) -> str | None:
    """compressed-tensors' name of how a scheme is stored, "dense" for a float copy, None when it has none."""
    weight, activation = scheme.weight, scheme.activation
    if weight.is_float_copy:
        return "dense" if activation is None else None
    dynamic = None if activation is None else activation.name
    if weight.grid.family == "int" and weight.scale in ("fp16", "bf16", "fp32"):
        if not weight.zero_point and not weight.grid.signed:
            return None
        by_token = dynamic in ("int8-channel", "int8")
        if weight.grid.bits == 8 and weight.granularity != "group" and by_token and not weight.zero_point:
            return "int-quantized"
        if weight.granularity == "tensor" or not (dynamic is None or dynamic == "int8-channel"):
            return None
        return "pack-quantized"
    if weight.name in ("fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-channel-sfp32", "fp8-e4m3-channel-sbf16"):
        return "float-quantized" if dynamic in (None, "fp8-e4m3", "fp8-e4m3-channel") else None
    blocks = {
        "mxfp4": "mxfp4-pack-quantized",
        "mxfp6-e2m3": "mxfp6-pack-quantized",
        "mxfp8-e4m3": "mxfp8-quantized",
        "nvfp4": "nvfp4-pack-quantized",
    }
    return blocks.get(weight.name) if dynamic is None else None


def compressed_tensors(layer: Layer, scheme: Scheme) -> str:
    """Checkpoints of compressed-tensors."""
    if scheme.weight.is_float_copy and scheme.activation is None:
        return ""
    if why := _not_linear(layer):
        return why
    if compressed_tensors_format(scheme) is None:
        return "it has no such scheme"
    return _whole_groups(layer, scheme.weight)


def _whole_groups(layer: Layer, weight: Format) -> str:
    if weight.granularity == "group" and layer.cols % weight.group_size:
        return f"its rows of {layer.cols} weights do not divide into groups of {weight.group_size}"
    return ""


FLOAT_COPIES = ("bf16", "fp16", "fp32")
GROUPS = ("g32", "g64", "g128", "channel")

GGUF_MODELS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3")

# ggml's tensor types by the formats whose values they hold exactly.
GGUF_TYPES = {
    "int8-g32": "Q8_0", "q6_k": "Q6_K", "q5_1": "Q5_1", "q5_k": "Q5_K", "int5-g32": "Q5_0", "q4_1": "Q4_1",
    "q4_k": "Q4_K", "int4-g32": "Q4_0", "iq4_nl": "IQ4_NL", "q3_k": "Q3_K", "q2_k": "Q2_K",
    "mxfp4": "MXFP4", "fp4-e2m1-g16-se4m3": "NVFP4", "bf16": "BF16", "fp16": "F16", "fp32": "F32",
}  # fmt: skip


# Fallbacks of llama.cpp's own quantizer for rows that do not divide into blocks.
GGUF_FALLBACKS = {
    "q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "int5-g32", "q5_k": "q5_1", "q6_k": "int8-g32",
    **dict.fromkeys(("iq4_nl", "int4-g32", "int5-g32", "q4_1", "q5_1", "int8-g32", "mxfp4"), "fp16"),
    "fp4-e2m1-g16-se4m3": "fp16",
}  # fmt: skip


def gguf_block(weight: Format) -> int:
    """Weights of one block of the format's tensor type; 0 for float copies, which have none."""
    if weight.super_group:
        return weight.group_size * weight.super_group
    return 64 if GGUF_TYPES.get(weight.name) == "NVFP4" else weight.group_size


def gguf(layer: Layer, scheme: Scheme) -> str:
    """ggml's tensor types."""
    if layer.kind not in ("linear", "embedding"):
        return f"it knows linear layers and embeddings, not {layer.kind}"
    if scheme.activation is not None:
        return "it chooses the rounding of activations itself"
    if scheme.weight.name not in GGUF_TYPES:
        return "it has no tensor type with these values"
    block = gguf_block(scheme.weight)
    if block and layer.cols % block:
        return f"its rows of {layer.cols} weights do not divide into blocks of {block}"
    return ""


def onnx(layer: Layer, scheme: Scheme) -> str:
    """Operators of ONNX Runtime."""
    weight, activation = scheme.weight, scheme.activation
    if layer.kind.startswith("transposed") and not weight.is_float_copy:
        return "it has no transposed convolutions with quantized weights"
    if activation is not None and (activation.name not in ("int8", "fp8-e4m3") or layer.kind == "embedding"):
        return "its activations are int8 or fp8 with one static scale, of layers that multiply"
    if weight.is_float_copy:
        return ""
    if not weight.is_plain or weight.scale not in ("fp32", "fp16", "bf16"):
        return "its scales are 16- or 32-bit floats, without minima"
    if weight.grid.family == "int":
        if weight.grid.bits not in (2, 4, 8):
            return "its integers have 2, 4 or 8 bits"
        if needs_int2(layer, scheme) and not has_int2():
            return "the onnx and onnxruntime that are installed have 2-bit integers in MatMulNBits only"
        return ""
    return "" if weight.grid.name in ("e4m3", "e5m2") else "it has no such scheme"


def _not_linear(layer: Layer) -> str:
    """The objection of consumers that quantize only linear layers; "" for those."""
    if layer.kind == "linear" and not layer.aliases:
        return ""
    return f"it quantizes linear layers with weights of their own, not {layer.kind}"


def _weights_alone(scheme: Scheme) -> str | None:
    """The answer of consumers without activation formats where the scheme alone decides it; None elsewhere."""
    if scheme.activation is not None:
        return "its activations stay in floating point"
    return "" if scheme.weight.is_float_copy else None


def gptq(layer: Layer, scheme: Scheme) -> str:
    """The GPTQ layout."""
    weight = scheme.weight
    if (known := _weights_alone(scheme)) is not None:
        return known
    if why := _not_linear(layer):
        return why
    if weight.grid.name not in ("int2", "int3", "int4", "int8") or weight.granularity == "tensor":
        return "it has symmetric integers of 2, 3, 4 and 8 bits by group or channel"
    if weight.scale != "fp16":
        return "its scales are float16"
    if layer.cols * weight.grid.bits % 32 or layer.rows * weight.grid.bits % 32:
        return f"{layer.rows} x {layer.cols} codes of {weight.grid.bits} bits do not fill whole 32-bit words"
    return _whole_groups(layer, weight)


# ModelOpt's algorithms by scheme.
MODELOPT_ALGORITHMS = {
    "nvfp4": "W4A16_NVFP4",
    "nvfp4+a:fp4-e2m1-g16-se4m3": "NVFP4",
    "fp8-e4m3-channel+a:fp8-e4m3-token": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-e4m3+a:fp8-e4m3": "FP8",
    "mxfp8-e4m3+a:mxfp8-e4m3": "MXFP8",
}


def modelopt(layer: Layer, scheme: Scheme) -> str:
    """ModelOpt's checkpoints of several precisions."""
    if scheme.weight.is_float_copy and scheme.activation is None:
        return ""
    if why := _not_linear(layer):
        return why
    if scheme.name not in MODELOPT_ALGORITHMS:
        return "it has no such algorithm"
    return _whole_groups(layer, scheme.weight)


# Models with the same layer names in mlx-lm and transformers.
MLX_MODELS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "olmo2", "granite",
)  # fmt: skip
MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (32, 64, 128)
# An integer with the same bits and groups; of a whole channel in groups of 128.
MLX_FALLBACKS = {
    f"int{bits}-{group}{asym}": parse_format(f"uint{bits}-{group.replace('channel', 'g128')}-mfp16").name
    for bits in MLX_BITS
    for group in (*(f"g{size}" for size in MLX_GROUPS), "channel")
    for asym in ("", "-asym")
}


def mlx_mode(format: Format) -> dict[str, Any] | None:
    """MLX's quantization parameters of a format with exactly the same values; None if it has none.

    >>> mlx_mode(parse_format("uint3-g64-mfp16"))
    {'group_size': 64, 'bits': 3, 'mode': 'affine'}
    """
    blocks = {"mxfp4": "mxfp4", "mxfp8-e4m3": "mxfp8", "fp4-e2m1-g16-se4m3": "nvfp4"}
    bits, size = format.grid.bits, format.group_size
    if mode := blocks.get(format.name):
        return {"group_size": size, "bits": bits, "mode": mode}
    affine = format.grid.family == "int" and bits in MLX_BITS and size in MLX_GROUPS
    if affine and format.minimum == format.scale and not format.super_group:
        return {"group_size": size, "bits": bits, "mode": "affine"}
    return None


def mlx(layer: Layer, scheme: Scheme) -> str:
    """Layers of MLX."""
    weight = scheme.weight
    if (known := _weights_alone(scheme)) is not None:
        return known
    if layer.kind not in ("linear", "embedding"):
        return f"it quantizes linear layers and embeddings, not {layer.kind}"
    if mlx_mode(weight) is None:
        return "its groups of 32, 64 or 128 integers have a scale and a minimum each, of one type"
    return _whole_groups(layer, weight)


VLLM_CPU = (
    *(f"int4-{size}{asym}" for size in ("g32", "g64", "g128", "channel") for asym in ("", "-asym")),
    *("int8-channel+a:int8-token", *FLOAT_COPIES),
)


FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}  # fmt: skip


def served_names(layer: str) -> tuple[str, ...]:
    """A layer's name, and that of the fused layer in which vLLM computes q/k/v or gate/up.

    >>> served_names("layers.0.mlp.up_proj")
    ('layers.0.mlp.up_proj', 'layers.0.mlp.gate_up_proj')
    """
    parent, dot, leaf = layer.rpartition(".")
    return (layer, f"{parent}{dot}{FUSED[leaf]}") if leaf in FUSED else (layer,)


def vllm_cpu(layer: Layer, scheme: Scheme) -> str:
    """compressed-tensors' schemes that vLLM's CPU kernels lack."""
    weight, activation = scheme.weight, scheme.activation
    if weight.is_float_copy:
        return ""
    if activation is not None:
        known = weight.name == "int8-channel" and activation.name == "int8-channel"
        return "" if known else "its CPU kernels support activations only as int8-channel+a:int8-token"
    if weight.grid.family != "int" or weight.grid.bits != 4:
        return "its CPU kernels support only 4-bit integers"
    if layer.rows % 32 or layer.cols % 32:
        return f"its CPU kernels need sides that are multiples of 32, not {layer.rows} x {layer.cols}"
    return ""


def transformers(layer: Layer, scheme: Scheme) -> str:
    """compressed-tensors' schemes that transformers does not load."""
    return "its loader does not support packed zero points" if scheme.weight.zero_point else ""


def openvino(layer: Layer, scheme: Scheme) -> str:
    """ONNX Runtime's operators that OpenVINO lacks."""
    weight = scheme.weight
    if weight.grid.family == "int" and weight.grid.bits == 2:
        return "it has no 2-bit integers"
    if weight.granularity == "group" and layer.cols % weight.group_size:
        return f"its blocks must divide rows, and {weight.group_size} does not divide {layer.cols}"
    return ""
