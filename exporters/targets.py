"""What the runtimes that people serve with can hold: rules on a layer and its scheme, known before any work."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from torch import nn

from mpq.core.allocation import Allocation, check_allocation
from mpq.core.errors import MpqError, nearest_names
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters.onnx.operators import has_int2, needs_int2


@dataclass(frozen=True)
class Consumer:
    """A file format and who reads it.

    `objection` says in half a sentence why a layer cannot have a scheme, "" when it can. `schemes` are the well-known
    ones, of which the nearest is named in a refusal; `fallbacks` is the consumer's own rule of what comes instead of
    what a layer cannot have. `fuses` says whether tied layers (q/k/v, gate/up) must share one. `takes` says whether it
    knows a model, `models` in words which ones, and `packages` what writing its files needs. `mixes` says whether rows
    of one layer may have formats of their own.
    """

    name: str
    readers: str
    schemes: tuple[str, ...]
    objection: Callable[[Layer, Scheme], str]
    fuses: bool = True
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    takes: Callable[[nn.Module], bool] = lambda model: True
    models: str = "any model"
    packages: tuple[str, ...] = ()
    mixes: bool = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Why a layer cannot have a scheme, in half a sentence, mixes considered; "" when it can."""
        if scheme.mix is not None and not self.mixes:
            return "all rows of a layer have one format there"
        return self.objection(layer, scheme)


def check_model(consumer: Consumer, model: nn.Module) -> None:
    """MpqError when the consumer does not know such a model, or a package that writes its files is missing."""
    if not consumer.takes(model):
        raise MpqError(
            f"{consumer.name} files hold {consumer.models}, not {type(model).__name__}: export to mpq instead"
        )
    check_packages(consumer)


def check_packages(consumer: Consumer) -> None:
    """MpqError when a package that writes the consumer's files is missing."""
    if not all(find_spec(package) for package in consumer.packages):
        needed = " and ".join(consumer.packages)
        raise MpqError(f"{consumer.name} files are written with {needed}: pip install 'mpq[{consumer.name}]'")


def check(consumer: Consumer, allocation: Allocation) -> None:
    """MpqError when a layer has a scheme that the consumer cannot hold, with the nearest that it can."""
    for layer in check_allocation(allocation).layers:
        scheme = allocation.scheme_of[layer.name]
        why = consumer.refusal(layer, scheme)
        if why:
            near = nearest(consumer, layer, scheme)
            advice = f"the nearest it can hold is {near}" if near else "leave the layer out"
            raise MpqError(f"{consumer.name} cannot hold layer {layer.name} in {scheme.name} ({why}): {advice}")
    if consumer.fuses:
        _check_ties(consumer, allocation)


def _check_ties(consumer: Consumer, allocation: Allocation) -> None:
    first: dict[str, Layer] = {}
    for layer in allocation.layers:
        other = first.setdefault(layer.tie or layer.name, layer)
        schemes = allocation.scheme_of[other.name].name, allocation.scheme_of[layer.name].name
        if schemes[0] != schemes[1]:
            raise MpqError(
                f"{consumer.readers} compute {other.name} and {layer.name} as one, so they must share a scheme, "
                f"not {schemes[0]} and {schemes[1]}: search with ties"
            )


def nearest(consumer: Consumer, layer: Layer, scheme: Scheme) -> str | None:
    """What the consumer itself would fall back on; else the well-known scheme that the layer can have, of the same kind
    of grid where there is one, closest in bits.
    """
    instead = consumer.fallbacks.get(scheme.name)
    while instead is not None:
        if not consumer.refusal(layer, parse_scheme(instead)):
            return instead
        instead = consumer.fallbacks.get(instead)
    bits = scheme.weight.effective_bits(layer.rows, layer.cols)

    def distance(name: str) -> tuple[bool, float, bool]:
        other = parse_scheme(name)
        gap = abs(other.weight.effective_bits(layer.rows, layer.cols) - bits)
        same = other.weight.grid.family == scheme.weight.grid.family
        return not same, round(gap, 2), (other.activation is None) != (scheme.activation is None)

    possible = [name for name in consumer.schemes if not consumer.refusal(layer, parse_scheme(name))]
    return min(possible, key=distance, default=None)


def forbidden(consumer: Consumer, layers: Sequence[Layer], schemes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The schemes that each layer cannot have, by layer name; what `mpq.core.problem.build_problem` takes as `forbid`.

    Raises:
        MpqError: a layer that can have none of them, with one that it could have.
    """
    schemes = tuple(schemes)
    refused: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        bad = tuple(name for name in schemes if consumer.refusal(layer, parse_scheme(name)))
        if len(bad) == len(schemes):
            near = nearest(consumer, layer, parse_scheme(schemes[0]))
            why = consumer.refusal(layer, parse_scheme(schemes[0]))
            raise MpqError(
                f"{consumer.name} can hold layer {layer.name} in none of {', '.join(schemes)} ({why}): add {near}"
            )
        if bad:
            refused[layer.name] = bad
    return refused


def consumer_named(name: str) -> Consumer:
    """A consumer by its own name or a reader's ("vllm"); MpqError with the known names."""
    name = READERS.get(name, name)
    if name not in CONSUMERS:
        raise MpqError(f"unknown export target {name!r}: {nearest_names(name, [*CONSUMERS, *READERS])}")
    return CONSUMERS[name]


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


def _compressed_tensors(layer: Layer, scheme: Scheme) -> str:
    if scheme.weight.is_float_copy and scheme.activation is None:
        return ""
    if layer.kind != "linear" or layer.aliases:
        return f"it quantizes linear layers with weights of their own, not {layer.kind}"
    if compressed_tensors_format(scheme) is None:
        return "it has no such scheme"
    return _whole_groups(layer, scheme.weight)


def _whole_groups(layer: Layer, weight: Format) -> str:
    if weight.granularity == "group" and layer.cols % weight.group_size:
        return f"its rows of {layer.cols} weights do not divide into groups of {weight.group_size}"
    return ""


FLOAT_COPIES = ("bf16", "fp16", "fp32")
GROUPS = ("g32", "g64", "g128", "channel")

# ggml's tensor types by the formats whose numbers they hold exactly.
GGUF_TYPES = {
    "int8-g32": "Q8_0", "q6_k": "Q6_K", "q5_1": "Q5_1", "q5_k": "Q5_K", "int5-g32": "Q5_0", "q4_1": "Q4_1",
    "q4_k": "Q4_K", "int4-g32": "Q4_0", "iq4_nl": "IQ4_NL", "q3_k": "Q3_K", "q2_k": "Q2_K",
    "mxfp4": "MXFP4", "fp4-e2m1-g16-se4m3": "NVFP4", "bf16": "BF16", "fp16": "F16", "fp32": "F32",
}  # fmt: skip


# What llama.cpp's own quantizer takes where a row does not divide into blocks.
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


def _gguf(layer: Layer, scheme: Scheme) -> str:
    if layer.kind not in ("linear", "embedding"):
        return f"it knows linear layers and embeddings, not {layer.kind}"
    if scheme.activation is not None:
        return "it rounds activations as it likes"
    if scheme.weight.name not in GGUF_TYPES:
        return "it has no tensor type with these numbers"
    block = gguf_block(scheme.weight)
    if block and layer.cols % block:
        return f"its rows of {layer.cols} weights do not divide into blocks of {block}"
    return ""


def _onnx(layer: Layer, scheme: Scheme) -> str:
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


def _gptq(layer: Layer, scheme: Scheme) -> str:
    weight = scheme.weight
    if scheme.activation is not None:
        return "its activations stay in floating point"
    if weight.is_float_copy:
        return ""
    if layer.kind != "linear" or layer.aliases:
        return f"it quantizes linear layers with weights of their own, not {layer.kind}"
    if weight.grid.name not in ("int2", "int3", "int4", "int8") or weight.granularity == "tensor":
        return "it has symmetric integers of 2, 3, 4 and 8 bits by group or channel"
    if weight.scale != "fp16":
        return "its scales are float16"
    if layer.cols * weight.grid.bits % 32 or layer.rows * weight.grid.bits % 32:
        return f"{layer.rows} x {layer.cols} codes of {weight.grid.bits} bits do not fill whole 32-bit words"
    return _whole_groups(layer, weight)


def _transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "to_json_string")


def _llama(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "llama"


CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer("mpq", "mpq's own loader", (), lambda layer, scheme: "", fuses=False, mixes=True),
        Consumer(
            "compressed-tensors",
            "vLLM, SGLang and transformers",
            (
                *(f"int{bits}-{size}" for bits in range(2, 9) for size in GROUPS),
                *(f"int{bits}-g128-asym" for bits in (2, 3, 4, 8)),
                *("int8-channel+a:int8-token", "fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-channel+a:fp8-e4m3-token"),
                *("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "nvfp4", *FLOAT_COPIES),
            ),
            _compressed_tensors,
            takes=_transformers,
            models="transformers models",
        ),
        Consumer(
            "gguf",
            "llama.cpp",
            tuple(GGUF_TYPES),
            _gguf,
            fuses=False,
            fallbacks=GGUF_FALLBACKS,
            takes=_llama,
            models="transformers' Llama models",
            packages=("gguf",),
        ),
        Consumer(
            "gptq",
            "gptqmodel and vLLM",
            (
                *(f"int{bits}-{size}" for bits in (2, 3, 4, 8) for size in GROUPS),
                *FLOAT_COPIES,
            ),
            _gptq,
            takes=_transformers,
            models="transformers models",
        ),
        Consumer(
            "onnx",
            "ONNX Runtime",
            (
                *("int8", "int8-channel", "int8-g32", "int4-channel", "int4-g32", "int4-g64", "int4-g128"),
                *("int2-channel", "int2-g32", "int2-g64", "int2-g64-asym", "int4-g128-asym", "int8-g128-asym"),
                *("fp8-e4m3", "fp8-e4m3-channel", "fp8-e5m2-channel", *FLOAT_COPIES),
                *("int8-channel+a:int8", "int4-channel+a:int8", "int2-channel+a:int8", "fp8-e4m3-channel+a:fp8-e4m3"),
            ),
            _onnx,
            fuses=False,
            packages=("onnx", "onnxscript"),
        ),
    )
}
READERS = {
    "vllm": "compressed-tensors",
    "sglang": "compressed-tensors",
    "transformers": "compressed-tensors",
    "llama.cpp": "gguf",
    "onnxruntime": "onnx",
}
