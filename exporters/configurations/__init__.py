"""Allocations as configurations of other quantizers, written and read.

Each tool has one spelling of a scheme for a layer, and reading searches for that spelling among the known formats, so
that `write_configuration` and `read_configuration` always agree. Formats of the files: ModelOpt's `quant_cfg` list,
llm-compressor's recipes, AutoRound's `layer_config`, GPTQModel's `dynamic`, `llama-quantize --tensor-type-file`, and
the `quantization` dictionary of mlx-lm's config.json.
"""

import json
import re
from collections.abc import Mapping, Sequence

import yaml

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, nearest_names
from mpq.core.layer import Layer
from mpq.exporters.configurations.autoround import AUTOROUND
from mpq.exporters.configurations.gptqmodel import GPTQMODEL
from mpq.exporters.configurations.llama_quantize import LLAMA_QUANTIZE
from mpq.exporters.configurations.llm_compressor import LLM_COMPRESSOR
from mpq.exporters.configurations.mlx import MLX
from mpq.exporters.configurations.modelopt import MODELOPT
from mpq.exporters.configurations.tool import Spelling, Tool, key_of, known_formats
from mpq.exporters.holding import FLOAT, check

TOOLS: dict[str, Tool] = {
    tool.name: tool for tool in (MODELOPT, LLM_COMPRESSOR, AUTOROUND, GPTQMODEL, LLAMA_QUANTIZE, MLX)
}


def write_configuration(tool: str, allocation: Allocation) -> str:
    """The file's text.

    Raises:
        MpqError: an unknown tool, or a layer whose scheme the tool cannot spell.
    """
    target = tool_named(tool)
    spellings: dict[str, Spelling | None] = {}
    check(target, allocation)
    for layer in allocation.layers:
        scheme = allocation.scheme_of[layer.name]
        spellings[layer.name] = None if scheme.weight.is_float_copy else target.spell(scheme.weight)
    return target.write(spellings)


def read_configuration(tool: str, text: str, layers: Sequence[Layer]) -> Allocation:
    """The allocation that a tool's file describes; layers that it does not name stay in bf16.

    Raises:
        MpqError: an unknown tool, a damaged file, a format that we do not have, a file that names none of the layers.
    """
    target = tool_named(tool)
    try:
        spellings = target.read(text, [layer.name for layer in layers])
    except (ValueError, TypeError, KeyError, AttributeError, re.error, yaml.YAMLError) as error:
        raise MpqError(f"not a {target.file} of {target.name} ({error}): name such a file") from error
    if not any(spellings.values()):
        raise MpqError(f"the {target.file} quantizes none of the layers {layers[0].name}, ...: is it for this model?")
    return Allocation(tuple(layers), tuple(_scheme(target, layer.name, spellings.get(layer.name)) for layer in layers))


def tool_of(text: str) -> str:
    """The name of the tool that takes such a file; MpqError where none is recognized."""
    try:
        parsed = yaml.safe_load(text)  # JSON too
    except yaml.YAMLError:
        parsed = None
    if isinstance(parsed, Mapping):
        for keys in (set(parsed), {key for part in parsed.values() if isinstance(part, Mapping) for key in part}):
            for tool in TOOLS.values():
                if keys & set(tool.marks):
                    return tool.name
        if nested := [part for part in parsed.values() if isinstance(part, Mapping)]:
            return tool_of(json.dumps(nested[0]))
    elif text.strip() and all("=" in line for line in text.split()):
        return LLAMA_QUANTIZE.name
    raise MpqError(f"no configuration of {', '.join(TOOLS)} is recognized: name the quantizer, as gptqmodel=FILE")


def tool_named(name: str) -> Tool:
    """The tool of that name; MpqError with the known names."""
    if name not in TOOLS:
        raise MpqError(f"unknown quantizer {name!r}: {nearest_names(name, TOOLS)}")
    return TOOLS[name]


def _scheme(tool: Tool, layer: str, spelling: Spelling | None) -> str:
    if spelling is None:
        return FLOAT
    key = key_of(spelling)
    if key not in known_formats(tool):
        raise MpqError(f"{tool.name} gives layer {layer} {json.dumps(spelling)}, a format that mpq does not have")
    return known_formats(tool)[key]
