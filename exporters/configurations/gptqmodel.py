"""GPTQModel's settings: a default width, and exceptions by regular expression in `dynamic`; "-:" skips layers."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of, usual_spelling
from mpq.exporters.rules import served_names


def _spell(format: Format) -> Spelling | None:
    integer = integer_of(format)
    if integer is None or integer[0] not in (2, 3, 4, 8):
        return None
    return dict(zip(("bits", "group_size", "sym"), integer, strict=True))


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    usual = usual_spelling(spellings)
    dynamic: dict[str, Any] = {}
    for name, spelling in spellings.items():
        sign, changes = ("-", {}) if spelling is None else ("+", spelling)
        if spelling != usual:
            dynamic.update({f"{sign}:^{re.escape(served)}$": changes for served in served_names(name)})
    return json.dumps({**usual, "desc_act": False, "dynamic": dynamic}, indent=1) + "\n"


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    config = json.loads(text)
    config = config.get("quantization_config", config)  # in a checkpoint's config.json
    usual = {"bits": config["bits"], "group_size": config.get("group_size", 128), "sym": config.get("sym", True)}
    spellings: dict[str, Spelling | None] = {}
    for layer in layers:
        spellings[layer] = usual
        for pattern, changes in (config.get("dynamic") or {}).items():
            sign, _, expression = pattern.rpartition(":") if pattern[:2] in ("+:", "-:") else ("+", "", pattern)
            if re.match(expression, layer):
                spellings[layer] = None if sign == "-" else {**usual, **{k: changes[k] for k in usual if k in changes}}
                break
    return spellings


GPTQMODEL = Tool("gptqmodel", "quantization config", _spell, _write, _read, marks=("dynamic", "desc_act"))
