"""Detecting stored weights of a Hugging Face model that are a quantizer's codes and not numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mpq.core.errors import MpqError
from mpq.sources.extras import need

FLOATS = ("F64", "F32", "F16", "BF16", "BOOL")  # masks are stored as BOOL
SCALES = ("scale", "scale_inv", "scales", "SCB", "absmax")  # ends of the names of a quantizer's scales


def check_stored_weights(name: str, config: Any) -> None:
    """MpqError for a folder or hub id whose weights transformers would take as numbers although they are codes.

    Codes are integers, and 8-bit floats that have scales beside them, where the config names no quantizer that
    transformers knows.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    stored = getattr(config, "quantization_config", None) or {}
    if stored:
        method = stored.get("quant_method", "") if isinstance(stored, dict) else getattr(stored, "quant_method", "")
        if str(getattr(method, "value", method)) not in KNOWN:
            raise MpqError(
                f"the weights of {name} are stored by a quantizer that transformers does not know here ({method!r}): "
                "give the original model"
            )
        return
    types = {tensor: (kind, dims) for file in _weight_files(folder_of(name)) for tensor, kind, dims in _stored_in(file)}
    scaled = any(tensor.endswith(SCALES) for tensor in types)
    for tensor, (kind, dims) in types.items():
        if _is_weight(tensor, dims) and kind not in FLOATS and (scaled or not kind.startswith("F8")):
            raise MpqError(
                f"{name} stores {tensor} as {kind}: expected floating-point numbers, or the quantizer of these codes "
                "in config.json (quantization_config): give the original model"
            )


def folder_of(name: str) -> Path:
    """The folder with a model's files: the one of this name, or a hub id's in the cache."""
    if Path(name).is_dir():
        return Path(name)
    transformers = need("transformers", "hf", f"Hugging Face models such as {name!r}")
    return Path(transformers.utils.cached_file(name, "config.json")).parent


def _is_weight(tensor: str, dims: int) -> bool:
    """Whether a tensor is a weight or bias by its name, and not an index or a causal mask, which was called bias."""
    return tensor.endswith(("weight", "_proj")) or (tensor.endswith("bias") and dims == 1)


def _weight_files(folder: Path) -> list[Path]:
    """The existing files that transformers reads."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        try:
            index = json.loads((folder / f"{whole}.index.json").read_text("utf-8"))
            return [path for path in {folder / file for file in index["weight_map"].values()} if path.is_file()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # transformers says what is wrong
            continue
    return []


def _stored_in(file: Path) -> Iterator[tuple[str, str, int]]:
    """Name, type (as safetensors calls it) and dimensions of a file's tensors; none where the file is damaged."""
    if file.suffix == ".bin":
        try:
            state = torch.load(file, map_location="meta", weights_only=True)
        except Exception:  # damaged: transformers says what is wrong
            return
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                codes = not value.is_floating_point() and value.dtype != torch.bool
                yield name, str(value.dtype) if codes else FLOATS[1], value.ndim
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (an open file is no dict)
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), len(part.get_shape())
    except (SafetensorError, OSError):  # transformers says what is wrong
        return
