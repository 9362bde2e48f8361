"""Writers of packed weights, one consumer, one file. Plugins add some through the entry-point group "mpq.exporters".

Every exporter is called as `export(model, allocation, folder, *, method, second_moments, recipe)` and gives the folder.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, nearest_names
from mpq.core.registry import Exporter, Registry

if TYPE_CHECKING:
    from torch import nn

EXPORTERS: Registry[Exporter] = Registry(
    Exporter,
    "export target",
    "mpq.exporters",
    [
        Exporter(
            "mpq", "mpq.exporters.mpq.checkpoint:export", "packed safetensors for mpq.load: every format, every layer"
        ),
        Exporter(
            "compressed-tensors",
            "mpq.exporters.compressed_tensors:export",
            "one scheme per group of layers, for vLLM, SGLang and transformers",
        ),
        Exporter(
            "gptq", "mpq.exporters.gptq:export", "the GPTQ layout, bits and groups per layer, for gptqmodel and vLLM"
        ),
        Exporter("gguf", "mpq.exporters.gguf.file:export", "a Llama for llama.cpp, each layer in its own tensor type"),
        Exporter(
            "onnx",
            "mpq.exporters.onnx.file:export",
            "a graph with integers at each layer's own width, for ONNX Runtime",
        ),
    ],
)


def exporter_named(name: str) -> Callable[..., Path]:
    """The exporter called `name`, ours or a plugin's; MpqError with the known names when there is none."""
    return EXPORTERS.named(name).load()


def export(
    model: "nn.Module", allocation: Allocation, folder: str | os.PathLike[str], *, to: str = "mpq", **options: Any
) -> Path:
    """Write a model's layers in an allocation's formats, packed for a consumer: `mpq.export`; what was written.

    Args:
        model: left as it is.
        allocation: layers and schemes.
        folder: made when missing.
        to: a name of EXPORTERS or of a plugin.
        options: the exporter's own, all optional: `method` (rounding) and `second_moments` for every one, `shard`,
            `recipe`, `inputs` (onnx, which traces with them), `ranges`, `tokenizer` (gguf).

    Raises:
        MpqError: an unknown target or option, or what the exporter refuses.
    """
    exporter = exporter_named(to)
    known = [
        name for name, option in inspect.signature(exporter).parameters.items() if option.kind.name == "KEYWORD_ONLY"
    ]
    for name in options:
        if name not in known:
            raise MpqError(f"unknown option {name!r} of the exporter {to}: {nearest_names(name, known)}")
    return exporter(model, allocation, folder, **options)
