"""Writers of packed weights, one consumer, one file. Plugins add some through the entry-point group "mpq.exporters".

Every exporter is called as `export(model, allocation, folder, *, method, second_moments, recipe)` and gives the folder.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from mpq.core.errors import MpqError, nearest_names

# name: (module:function, what it is)
EXPORTERS: dict[str, tuple[str, str]] = {
    "mpq": ("mpq.exporters.mpq.checkpoint:export", "packed safetensors for mpq.load: every format, every layer"),
    "compressed-tensors": (
        "mpq.exporters.compressed_tensors:export",
        "one scheme per group of layers, for vLLM, SGLang and transformers",
    ),
    "gptq": (
        "mpq.exporters.gptq:export",
        "the GPTQ layout, bits and groups per layer, for gptqmodel and vLLM",
    ),
    "gguf": ("mpq.exporters.gguf.file:export", "a Llama for llama.cpp, each layer in its own tensor type"),
    "onnx": ("mpq.exporters.onnx.file:export", "a graph with integers at each layer's own width, for ONNX Runtime"),
}


def exporter_named(name: str) -> Callable[..., Path]:
    """The exporter called `name`, ours or a plugin's; MpqError with the known names when there is none."""
    plugins = {entry.name: entry for entry in entry_points(group="mpq.exporters")}
    if name in EXPORTERS:
        module, _, function = EXPORTERS[name][0].partition(":")
        exporter: Callable[..., Path] = getattr(import_module(module), function)
        return exporter
    if name in plugins:
        plugin: Callable[..., Path] = plugins[name].load()
        return plugin
    raise MpqError(f"unknown export target {name!r}: {nearest_names(name, [*EXPORTERS, *plugins])}")
