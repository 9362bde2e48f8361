"""Block sizes by device: the user's tuned table first, then the shipped one, then a conservative rule."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch

from mpq.core.files import write_atomically
from mpq.core.formats import parse_format
from mpq.kernels.gpu.cuda.nvrtc import cache_folder
from mpq.kernels.gpu.triton.config import Config, default_config
from mpq.kernels.gpu.triton.spec import spec_of


def bucket(tokens: int) -> int:
    """The power of two that a batch is tuned as: 1 to 512."""
    return min(512, 1 << max(0, tokens - 1).bit_length())


def key_of(format: str, activation: str, tokens: int, rows: int, cols: int) -> str:
    """A table's key.

    >>> key_of("int4-g128", "", 3, 4096, 11008)
    'int4-g128:4096x11008:4'
    """
    return f"{format}{'+a:' * bool(activation)}{activation}:{rows}x{cols}:{bucket(tokens)}"


@lru_cache(maxsize=4096)
def config_for(format: str, activation: str, tokens: int, rows: int, cols: int, device: torch.device) -> Config:
    """Block sizes of a product on a device."""
    name, processors = device_facts(device)
    tuned = table_of(name).get(key_of(format, activation, tokens, rows, cols))
    return tuned or default_config(spec_of(parse_format(format)), tokens, rows, cols, processors)


def device_facts(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors; 1 for the interpreter."""
    if device.type != "cuda":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@lru_cache(maxsize=16)
def table_of(device_name: str) -> dict[str, Config]:
    """All choices known for a device."""
    configs: dict[str, Config] = {}
    shipped = files("mpq.kernels.gpu.triton") / f"{_slug(device_name)}.json"
    for path in (shipped, tuned_path(device_name)):
        if path.is_file():
            entries = json.loads(path.read_text(encoding="utf-8"))["configs"]
            configs |= {key: Config(**fields) for key, fields in entries.items()}
    return configs


def provenance_of(device_name: str) -> str:
    """Origin of a device's block sizes, and whether any was measured."""
    if tuned_path(device_name).is_file():
        return f"tuned here ({tuned_path(device_name)}), defaults where not"
    return "the defaults, never measured: 'mpq bench --device cuda --tune' measures"


def tuned_path(device_name: str) -> Path:
    """The user's own table for a device."""
    return cache_folder() / "tuned" / f"{_slug(device_name)}.json"


def remember(device_name: str, configs: Mapping[str, Config]) -> None:
    """Add tuned choices to the user's table."""
    path = tuned_path(device_name)
    known = json.loads(path.read_text(encoding="utf-8"))["configs"] if path.is_file() else {}
    known |= {key: asdict(config) for key, config in configs.items()}
    with write_atomically(path) as draft:
        draft.write_text(json.dumps({"device": device_name, "tuned": True, "configs": known}, indent=1, sort_keys=True))
    table_of.cache_clear()
    config_for.cache_clear()


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
