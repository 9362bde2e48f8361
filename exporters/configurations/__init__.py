"""An allocation as other quantizers take it, and their files read back: for people who keep the quantizer they have.

Each tool says how it spells a scheme for one layer; reading back looks the same spelling up among the formats we know,
so that what `write_configuration` writes and `read_configuration` reads cannot drift apart. Formats of the files:
ModelOpt's `quant_cfg` list, llm-compressor's recipes, AutoRound's `layer_config`, GPTQModel's `dynamic`,
`llama-quantize --tensor-type-file`, and the `quantization` dictionary of mlx-lm's config.json.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import yaml

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, nearest_names
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters.configurations.autoround import AUTOROUND
from mpq.exporters.configurations.gptqmodel import GPTQMODEL
from mpq.exporters.configurations.llama_quantize import LLAMA_QUANTIZE
from mpq.exporters.configurations.llm_compressor import LLM_COMPRESSOR
from mpq.exporters.configurations.mlx import MLX
from mpq.exporters.configurations.modelopt import MODELOPT
from mpq.exporters.configurations.tool import Spelling, Tool, key_of
from mpq.exporters.targets import GGUF_TYPES, gguf_block

FLOAT = "bf16"  # a layer that a configuration leaves alone
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
    for layer in allocation.layers:
        scheme = allocation.scheme_of[layer.name]
        why = objection(target, layer, scheme)
        if why:
            raise MpqError(f"{target.name} cannot quantize {layer.name} to {scheme.name} ({why}): forbid it there")
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
        raise MpqError(f"this is no {target.file} of {target.name} ({error}): give the file that it takes") from error
    if not any(spellings.values()):
        raise MpqError(f"the {target.file} quantizes none of the layers {layers[0].name}, ...: is it for this model?")
    return Allocation(tuple(layers), tuple(_scheme(target, layer.name, spellings.get(layer.name)) for layer in layers))


def forbidden_by(tool: str, layers: Sequence[Layer], schemes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The schemes that a tool cannot give each layer, by layer name, as `mpq.core.problem.build_problem` takes them.

    Raises:
        MpqError: a layer that can have none of the schemes.
    """
    target, refused = tool_named(tool), {}
    names = tuple(schemes)
    for layer in layers:
        reasons = {name: objection(target, layer, parse_scheme(name)) for name in names}
        bad = tuple(name for name, why in reasons.items() if why)
        if len(bad) == len(names):
            raise MpqError(
                f"{target.name} can give layer {layer.name} none of {', '.join(names)} ({reasons[names[0]]}): "
                f"add {FLOAT} to the formats, or exclude the layer"
            )
        if bad:
            refused[layer.name] = bad
    return refused


def objection(tool: Tool, layer: Layer, scheme: Scheme) -> str:
    """Why a tool cannot give a layer a scheme, in half a sentence; "" where it can."""
    if scheme.activation is not None:
        return "configurations describe weights alone"
    if scheme.weight.is_float_copy:
        return ""
    if layer.kind not in tool.kinds or (layer.aliases and tool.kinds == ("linear",)):
        return f"it quantizes {' and '.join(tool.kinds)} layers of their own weights"
    if tool.spell(scheme.weight) is None:
        return "it has no such format"
    block = gguf_block(scheme.weight) if tool.name == "llama-quantize" else scheme.weight.group_size
    return f"rows of {layer.cols} weights do not divide into {block}" if block and layer.cols % block else ""


def tool_named(name: str) -> Tool:
    """The tool of that name; MpqError with the known names."""
    if name not in TOOLS:
        raise MpqError(f"unknown quantizer {name!r}: {nearest_names(name, TOOLS)}")
    return TOOLS[name]


def _scheme(tool: Tool, layer: str, spelling: Spelling | None) -> str:
    if spelling is None:
        return FLOAT
    key = key_of(spelling)
    if key not in _known(tool):
        raise MpqError(f"{tool.name} gives layer {layer} {json.dumps(spelling)}, a format that mpq does not have")
    return _known(tool)[key]


@lru_cache
def _known(tool: Tool) -> dict[str, str]:
    """Scheme by spelling, of every format that people use."""
    groups = ("-channel", *(f"-g{size}" for size in (16, 32, 64, 128, 256)))
    integers = [f"int{bits}{group}{asym}" for bits in range(2, 9) for group in groups for asym in ("", "-asym")]
    others = ("mxfp4", "mxfp8-e4m3", "nvfp4", "fp8-e4m3", "fp8-e4m3-channel", *GGUF_TYPES)
    known: dict[str, str] = {}
    for name in (*integers, *others):
        spelling = tool.spell(parse_scheme(name).weight)
        if spelling is not None:
            known.setdefault(key_of(spelling), name)
    return known
