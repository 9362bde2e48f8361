"""`quantization` of an mlx-lm config.json: a usual width and what differs by layer; each affine group has a minimum."""

import json
from collections.abc import Mapping, Sequence

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of, usual_spelling


def _spell(format: Format) -> Spelling | None:
    integer = integer_of(format)
    if integer is not None and integer[0] in (2, 3, 4, 5, 6, 8) and integer[1] in (32, 64, 128):
        return {"group_size": integer[1], "bits": integer[0], "mode": "affine"}
    blocks = {"mxfp4": (32, 4, "mxfp4"), "mxfp8-e4m3": (32, 8, "mxfp8"), "nvfp4": (16, 4, "nvfp4")}
    if format.name not in blocks:
        return None
    return dict(zip(("group_size", "bits", "mode"), blocks[format.name], strict=True))


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    usual = usual_spelling(spellings)
    layers = {
        name: False if spelling is None else spelling for name, spelling in spellings.items() if spelling != usual
    }
    return json.dumps({"quantization": {**usual, **layers}}, indent=1) + "\n"


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
