"""`quantization` of an mlx-lm config.json: a default width and exceptions by layer; affine groups have minima."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of, usual_spelling
from mpq.exporters.rules import MLX_BITS, MLX_GROUPS, mlx_mode


def _spell(format: Format) -> Spelling | None:
    integer = integer_of(format)
    if integer is not None and integer[0] in MLX_BITS and integer[1] in MLX_GROUPS:
        return {"group_size": integer[1], "bits": integer[0], "mode": "affine"}
    return {"group_size": 16, "bits": 4, "mode": "nvfp4"} if format.name == "nvfp4" else mlx_mode(format)


def quantization(spellings: Mapping[str, Spelling | None]) -> dict[str, Any]:
    """The default spelling, and exceptions by layer name; false for layers without one."""
    usual = usual_spelling(spellings)
    layers = {
        name: False if spelling is None else spelling for name, spelling in spellings.items() if spelling != usual
    }
    return {**usual, **layers}


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    return json.dumps({"quantization": quantization(spellings)}, indent=1) + "\n"


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    config = json.loads(text)
    entries = config.get("quantization", config)
    usual = {name: entries.get(name, "affine") for name in ("group_size", "bits", "mode")}
    spellings: dict[str, Spelling | None] = {}
    for layer in layers:
        changes = entries.get(layer, {})
        spellings[layer] = None if changes is False else {**usual, **(changes if isinstance(changes, Mapping) else {})}
    return spellings


MLX = Tool(
    "mlx",
    "quantization dictionary",
    _spell,
    _write,
    _read,
    ("linear", "embedding"),
    marks=("quantization",),
    fuses=False,
)
