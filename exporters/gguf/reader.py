"""Reading of GGUF exports, whole or split, with checks: a truncated or altered tensor is named."""

import glob
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.exporters.folder import digest, read_checksums
from mpq.exporters.holding import check_packages
from mpq.exporters.targets import TARGETS


def gguf_package() -> Any:
    """The package gguf; MpqError with how to install it."""
    check_packages(TARGETS["gguf"])
    return import_module("gguf")


def read_tensors(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and the float32 numbers of every tensor in an exported folder, one at a time.

    Raises:
        MpqError: the folder is no GGUF export; a file is missing, cut or altered, named with the tensor.
    """
    gguf = gguf_package()
    for name, tensor in checked_tensors(folder):
        yield name, torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()


def checked_tensors(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """llama.cpp's name and the stored blocks of every tensor in an exported folder; MpqError as `read_tensors`."""
    gguf = gguf_package()
    path = Path(folder)
    recorded = {file: tensors for file, tensors in read_checksums(path).items() if file.endswith(".gguf")}
    if not recorded:
        raise MpqError(f"{path} holds no GGUF export: write one with mpq export --to gguf")
    for file, digests in recorded.items():
        assert isinstance(digests, dict)
        reader = _open(path / file, gguf)
        for name in digests.keys() ^ reader.keys():
            what = "lacks" if name in digests else "holds"
            raise MpqError(f"{path / file} {what} the tensor {name}, unlike the export: export again")
        for name, tensor in reader.items():
            if digest(tensor.data.tobytes()) != digests[name]:
                raise MpqError(f"{path / file}: the tensor {name} is not what was exported (its checksum differs)")
            yield name, tensor


def tensor_types(path: Path) -> dict[str, str]:
    """ggml's type of every tensor of a GGUF file, and of the others that it is split into, by llama.cpp's names."""
    gguf = gguf_package()
    first = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    files = sorted(path.parent.glob(f"{glob.escape(first[1])}*{glob.escape(first[2])}")) if first else [path]
    return {
        name: str(gguf.GGMLQuantizationType(tensor.tensor_type).name)
        for file in files
        for name, tensor in _open(file, gguf).items()
    }


def _open(path: Path, gguf: Any) -> dict[str, Any]:
    """The tensors of one file by name."""
    if not path.is_file():
        raise MpqError(f"{path} is missing: export again")
    last = ""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _build_tensors(self, start: int, fields: list[Any]) -> None:
            nonlocal last
            every: list[Any] = []
            for field in fields:
                last = bytes(field.parts[1]).decode("utf-8", "replace")
                super()._build_tensors(start, [field])
                every += self.tensors
            self.tensors: list[Any] = every

    try:
        return {tensor.name: tensor for tensor in Reader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        where = f"its tensor {last}" if last else "its header"
        raise MpqError(f"{path} is cut or damaged at {where} ({error}): export again") from error
