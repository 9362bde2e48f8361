"""llm-compressor's recipe: a modifier that groups layers by scheme, in compressed-tensors' terms."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of, key_of


def _spell(format: Format) -> Spelling | None:
    if (integer := integer_of(format)) is not None:
        bits, group, symmetric = integer
        strategy = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
        return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    floats = {
        "fp8-e4m3": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
        "fp8-e4m3-channel": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        "nvfp4": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
        "mxfp4": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
    }  # fmt: skip
    return floats.get(format.name)


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    groups: dict[str, list[str]] = {}
    for name, spelling in spellings.items():
        if spelling is not None:
            groups.setdefault(key_of(spelling), []).append(name)
    config = {
        f"group_{i}": {"targets": names, "weights": json.loads(key)} for i, (key, names) in enumerate(groups.items())
    }
    ignore = [name for name, spelling in spellings.items() if spelling is None]
    modifier = {"GPTQModifier": {"ignore": ignore, "config_groups": config}}
    return str(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifier}}, sort_keys=False))


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    spellings: dict[str, Spelling | None] = dict.fromkeys(layers)
    for modifier in _modifiers(yaml.safe_load(text)):
        for group in modifier.get("config_groups", {}).values():
            for layer in layers:
                if any(_targets(target, layer) for target in group["targets"]):
                    spellings[layer] = _plain(group["weights"])
        for layer in layers:
            if any(_targets(target, layer) for target in modifier.get("ignore") or ()):
                spellings[layer] = None
    return spellings


def _plain(weights: Mapping[str, Any]) -> Spelling:
    """Without the observer's settings, which a checkpoint's config.json adds."""
    known = ("num_bits", "type", "symmetric", "strategy", "group_size")
    plain = {name: weights[name] for name in known if weights.get(name) is not None}
    return {**plain, "scale_dtype": "torch.uint8"} if weights.get("scale_dtype") == "torch.uint8" else plain


def _modifiers(recipe: Any) -> Iterable[Mapping[str, Any]]:
    """The modifiers with config groups, at any depth of a recipe."""
    if isinstance(recipe, Mapping):
        if "config_groups" in recipe:
            yield recipe
        for part in recipe.values():
            yield from _modifiers(part)


def _targets(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return target in (layer, "Linear")


LLM_COMPRESSOR = Tool("llm-compressor", "recipe", _spell, _write, _read, marks=("config_groups",))
