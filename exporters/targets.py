"""Consumers of exported models: one registry for `--for` and `--to`. Plugins add some through the entry-point group
"mpq.exporters": a function that writes files, or a `Target` with rules.

Every function takes an `mpq.exporters.request.ExportRequest` and returns the folder.
A target named after a program (vllm, llama.cpp) writes the files of one named after a format (compressed-tensors,
gguf), and may support fewer schemes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mpq.core.cache import EVERY
from mpq.core.formats import DEFAULT_FORMATS, ROW_FORMATS
from mpq.core.layer import Layer
from mpq.core.registry import Registry, Target
from mpq.core.scheme import Scheme
from mpq.exporters import measured, rules
from mpq.exporters.caches import KINDS, LAYERS, LLAMA_TYPES, llama_options, vllm_options

GROUPS = ("g32", "g64", "g128", "channel")
# One run on zeros, in sizes of one where the graph leaves them open.
RUN_ONNX_RUNTIME = (
    "python -c \"import numpy, onnxruntime; s = onnxruntime.InferenceSession('{folder}/model.onnx'); print(s.run(None, "
    "{{i.name: numpy.zeros([n if isinstance(n, int) else 1 for n in i.shape], 'int64' if 'int64' in i.type else "
    "'float32') for i in s.get_inputs()}}))\""
)
RUN_OPENVINO = (
    "python -c \"import numpy, openvino; m = openvino.compile_model('{folder}/model.onnx'); print(m([numpy.zeros("
    '[n.min_length or 1 for n in i.partial_shape], i.element_type.to_dtype()) for i in m.inputs]))"'
)


def _transformers(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "to_json_string")


def _gguf(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) in rules.GGUF_MODELS


def _mlx(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) in rules.MLX_MODELS


def narrowed(
    file: Callable[[Layer, Scheme], str], device: Callable[[Layer, Scheme], str], layer: Layer, scheme: Scheme
) -> str:
    """The objection of the file format, or else of the device that runs it."""
    return file(layer, scheme) or device(layer, scheme)


MPQ = Target(
    "mpq", "mpq.exporters.mpq.checkpoint:export", "packed safetensors for mpq.load: every format, every layer",
    readers="mpq's own loader", mixes=True, experts=True, caches=EVERY, consumers=measured.MPQ,
    command="mpq generate {folder} --prompt 'It is a truth'",
    sizer="mpq.exporters.mpq.checkpoint:sizer",
)  # fmt: skip
COMPRESSED_TENSORS = Target(
    "compressed-tensors", "mpq.exporters.compressed_tensors:export",
    "one scheme per group of layers, for vLLM, SGLang and transformers",
    schemes=(
        *(f"int{bits}-{size}" for bits in range(2, 9) for size in GROUPS),
        *(f"int{bits}-g128-asym" for bits in (2, 3, 4, 8)),
        *("int8-channel+a:int8-token", "fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-channel+a:fp8-e4m3-token"),
        *("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "nvfp4", *rules.FLOAT_COPIES),
    ),
    objection=rules.compressed_tensors, readers="vLLM, SGLang and transformers", fuses=True, takes=_transformers,
    consumers=measured.VLLM,
    models="transformers models", caches=("fp8-e4m3", "fp16"), caches_alike=LAYERS, cache_options=vllm_options,
    reads=("ranges",),
    sizer="mpq.exporters.compressed_tensors:sizer",
)  # fmt: skip
GPTQ = Target(
    "gptq", "mpq.exporters.gptq:export", "the GPTQ layout, bits and groups per layer, for gptqmodel and vLLM",
    schemes=(*(f"int{bits}-{size}" for bits in (2, 3, 4, 8) for size in GROUPS), *rules.FLOAT_COPIES),
    objection=rules.gptq, readers="gptqmodel and vLLM", fuses=True, takes=_transformers, models="transformers models",
    consumers=measured.GPTQ,
    command="vllm serve {folder}",
    sizer="mpq.exporters.gptq:sizer",
)  # fmt: skip
MODELOPT = Target(
    "modelopt", "mpq.exporters.modelopt:export", "ModelOpt's MIXED_PRECISION, for vLLM and TensorRT-LLM",
    schemes=(*rules.MODELOPT_ALGORITHMS, *rules.FLOAT_COPIES), objection=rules.modelopt,
    readers="vLLM and TensorRT-LLM", fuses=True, consumers=measured.MODELOPT, takes=_transformers,
    models="transformers models", command="vllm serve {folder}",
    sizer="mpq.exporters.modelopt:sizer", reads=("ranges",),
)  # fmt: skip
GGUF = Target(
    "gguf", "mpq.exporters.gguf.file:export", "one file for llama.cpp, each layer in its own tensor type",
    schemes=tuple(rules.GGUF_TYPES), objection=rules.gguf, readers="llama.cpp", fallbacks=rules.GGUF_FALLBACKS,
    consumers=measured.LLAMA_CPP,
    takes=_gguf, experts=True, packages=("gguf",), extra="gguf",
    models=f"transformers' {', '.join(rules.GGUF_MODELS)} models",
    command="llama-cli -m {folder}/model.gguf", caches=tuple(LLAMA_TYPES), caches_alike=KINDS,
    cache_options=llama_options,
    sizer="mpq.exporters.gguf.file:sizer",
)  # fmt: skip
MLX = Target(
    "mlx", "mpq.exporters.mlx:export", "each layer in a mode, width and group size of its own, for mlx-lm",
    schemes=(
        *(f"uint{bits}-g{size}-mfp16" for bits in (2, 3) for size in (32, 64, 128)),
        *("q4_1", "uint4-g64-mfp16", "uint4-g128-mfp16", "uint5-g64-mfp16", "uint6-g64-mfp16", "uint8-g64-mfp16"),
        *("mxfp4", "mxfp8-e4m3", *rules.FLOAT_COPIES),
    ),
    objection=rules.mlx, fallbacks=rules.MLX_FALLBACKS, readers="mlx-lm", consumers=measured.MLX, takes=_mlx,
    models=f"transformers' {', '.join(rules.MLX_MODELS)} models",
    command="mlx_lm.generate --model {folder} --prompt 'It is a truth'",
    sizer="mpq.exporters.mlx:sizer",
)  # fmt: skip
ONNX = Target(
    "onnx", "mpq.exporters.onnx.file:export", "a graph with integers at each layer's own width, for ONNX Runtime",
    schemes=(
        *("int8", "int8-channel", "int8-g32", "int4-channel", "int4-g32", "int4-g64", "int4-g128"),
        *("int2-channel", "int2-g32", "int2-g64", "int2-g64-asym", "int4-g128-asym", "int8-g128-asym"),
        *("fp8-e4m3", "fp8-e4m3-channel", "fp8-e5m2-channel", *rules.FLOAT_COPIES),
        *("int8-channel+a:int8", "int4-channel+a:int8", "int2-channel+a:int8", "fp8-e4m3-channel+a:fp8-e4m3"),
    ),
    objection=rules.onnx, readers="ONNX Runtime", packages=("onnx", "onnxscript"), extra="onnx",
    consumers=measured.ONNX_RUNTIME, command=RUN_ONNX_RUNTIME,
    reads=("inputs", "ranges"),
    sizer="mpq.exporters.onnx.file:sizer",
)  # fmt: skip


def _program(file: Target, name: str, doc: str, **changes: Any) -> Target:
    return replace(file, name=name, doc=f"{doc}; writes {file.name}", readers=changes.pop("readers", name), **changes)


def _narrower(file: Target, device: Callable[[Layer, Scheme], str], schemes: tuple[str, ...]) -> dict[str, Any]:
    return {"objection": partial(narrowed, file.objection, device), "schemes": schemes}


def _without(file: Target, part: str) -> tuple[str, ...]:
    return tuple(name for name in file.schemes if part not in name)


TARGETS: Registry[Target] = Registry(
    Target,
    "export target",
    "mpq.exporters",
    [
        MPQ,
        _program(COMPRESSED_TENSORS, "vllm", "vLLM on a GPU", readers="vLLM", command="vllm serve {folder}"),
        _program(
            COMPRESSED_TENSORS, "vllm:cpu", "vLLM on a CPU", readers="vLLM on a CPU", caches=(),
            consumers=measured.VLLM_CPU,
            command="vllm serve {folder}", **_narrower(COMPRESSED_TENSORS, rules.vllm_cpu, rules.VLLM_CPU),
        ),
        _program(
            COMPRESSED_TENSORS, "sglang", "SGLang", readers="SGLang", consumers=(), caches=(),
            command="python -m sglang.launch_server --model-path {folder}",
        ),
        _program(
            COMPRESSED_TENSORS, "transformers", "transformers' from_pretrained", readers="transformers", caches=(),
            consumers=measured.TRANSFORMERS,
            command="transformers chat {folder}",
            **_narrower(COMPRESSED_TENSORS, rules.transformers, _without(COMPRESSED_TENSORS, "-asym")),
        ),
        COMPRESSED_TENSORS,
        GPTQ,
        MODELOPT,
        _program(GGUF, "llama.cpp", "llama.cpp and what is built on it"),
        GGUF,
        MLX,
        _program(ONNX, "onnxruntime", "ONNX Runtime", readers="ONNX Runtime"),
        _program(
            ONNX, "openvino", "OpenVINO", readers="OpenVINO", consumers=measured.OPENVINO,
            command=RUN_OPENVINO,
            **_narrower(ONNX, rules.openvino, _without(ONNX, "int2-")),
        ),
        ONNX,
    ],
)  # fmt: skip


def formats_of(target: Target, granularity: str = "layer") -> Sequence[str]:
    """The default candidate schemes of a target.

    Activations are rounded only if the target requires it for such weights, since they add loss at the same bytes.

    >>> [name for name in formats_of(TARGETS["modelopt"]) if "+a:" in name]
    ['fp8-e4m3-channel+a:fp8-e4m3-token', 'fp8-e4m3+a:fp8-e4m3', 'mxfp8-e4m3+a:mxfp8-e4m3']
    """
    alone = {name for name in target.schemes if "+a:" not in name}
    held = [name for name in target.schemes if name in alone or name.partition("+a:")[0] not in alone]
    return held or (ROW_FORMATS if granularity == "row" else DEFAULT_FORMATS)
