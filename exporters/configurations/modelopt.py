"""ModelOpt's `quant_cfg`: an ordered list, of which the last entry that matches a quantizer's name decides."""

import glob
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of


def _spell(format: Format) -> Spelling | None:
    if (integer := integer_of(format)) is not None:
        bits, group, symmetric = integer
        if not symmetric:
            return None
        return {"num_bits": bits, "axis": 0} if group < 0 else {"num_bits": bits, "block_sizes": {-1: group}}
    blocks: dict[str, Spelling] = {
        "nvfp4": {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}},
        "mxfp4": {"num_bits": [2, 1], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}},
        "mxfp8-e4m3": {"num_bits": [4, 3], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}},
        "fp8-e4m3": {"num_bits": [4, 3], "axis": None},
        "fp8-e4m3-channel": {"num_bits": [4, 3], "axis": 0},
    }
    return blocks.get(format.name)


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, spelling in spellings.items():
        if spelling is not None:
            entries.append(
                {"quantizer_name": f"{glob.escape(name)}.weight_quantizer", "cfg": dict(spelling), "enable": True}
            )
    return str(yaml.safe_dump({"quant_cfg": entries, "algorithm": "max"}, sort_keys=False))


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    spellings: dict[str, Spelling | None] = dict.fromkeys(layers)
    for entry in yaml.safe_load(text)["quant_cfg"]:
        for layer in layers:
            if fnmatchcase(f"{layer}.weight_quantizer", entry["quantizer_name"]):
                spelling = entry.get("cfg", spellings[layer])
                spellings[layer] = spelling if entry.get("enable", True) else None
    return spellings


MODELOPT = Tool("modelopt", "quant_cfg", _spell, _write, _read, marks=("quant_cfg",))
