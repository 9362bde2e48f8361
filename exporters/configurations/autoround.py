"""AutoRound's `layer_config`: a dictionary by layer."""

import json
from collections.abc import Mapping, Sequence

from mpq.core.formats import Format
from mpq.exporters.configurations.tool import Spelling, Tool, integer_of


def _spell(format: Format) -> Spelling | None:
    if (integer := integer_of(format)) is not None:
        bits, group, symmetric = integer
        return {"bits": bits, "group_size": group, "sym": symmetric, "data_type": "int"}
    blocks = {"mxfp4": (4, 32, "mx_fp"), "mxfp8-e4m3": (8, 32, "mx_fp"), "nvfp4": (4, 16, "nv_fp")}
    if format.name not in blocks:
        return None
    bits, group, kind = blocks[format.name]
    return {"bits": bits, "group_size": group, "sym": True, "data_type": kind}


def _write(spellings: Mapping[str, Spelling | None]) -> str:
    unquantized = {"bits": 16, "data_type": "float"}
    return (
        json.dumps(
            {name: unquantized if spelling is None else spelling for name, spelling in spellings.items()}, indent=1
        )
        + "\n"
    )


def _read(text: str, layers: Sequence[str]) -> Mapping[str, Spelling | None]:
    spellings = {}
    for name, spelling in json.loads(text).items():
        full = {"group_size": 128, "sym": True, "data_type": "int", **spelling}
        spellings[name] = None if full["bits"] >= 16 else full
    return {layer: spellings.get(layer) for layer in layers}


AUTOROUND = Tool("autoround", "layer_config", _spell, _write, _read, marks=("data_type",))
