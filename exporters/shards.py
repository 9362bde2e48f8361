"""Tensors in one safetensors file, or in shards with an index, as Hugging Face names them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.exporters.folder import Checksums, digest, read_checked_json, safe_name

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
SHARD = 5_000_000_000  # bytes
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(
    folder: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], shard: int = SHARD
) -> dict[str, dict[str, str]]:
    """Write the tensors, one shard in memory at a time; digests of the tensors of each file.

    Args:
        folder: where to.
        specs: shape and type of every tensor, by name, in the order of `tensors`.
        tensors: names and tensors.
        shard: largest bytes of a file, unless one tensor alone is larger.
    """
    sizes = {name: tensor_bytes(*spec) for name, spec in specs.items()}
    plan = _plan(sizes, shard)
    files = [WHOLE] if len(plan) == 1 else [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    coming = iter(tensors)
    digests: dict[str, dict[str, str]] = {}
    for file, names in zip(files, plan, strict=True):
        shard_tensors = {name: _checked(name, specs[name], *next(coming)) for name in names}
        try:
            save_file(shard_tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise MpqError(f"cannot write {folder / file}: {error}") from error
        digests[file] = {name: tensor_digest(tensor) for name, tensor in shard_tensors.items()}
        del shard_tensors  # free memory before the next shard
    if len(files) > 1:
        weight_map = {name: file for file, names in digests.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=0) + "\n", encoding="utf-8")
    return digests


def _checked(name: str, spec: tuple[tuple[int, ...], torch.dtype], actual: str, tensor: Tensor) -> Tensor:
    if (name, *spec) != (actual, tuple(tensor.shape), tensor.dtype):
        raise AssertionError(f"expected the tensor {name} {spec}, got {actual} {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.detach().cpu().contiguous()


def _plan(sizes: Mapping[str, int], shard: int) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if plan[-1] and filled + size > shard:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


# The types of safetensors in the order in which a file holds its tensors, widest first.
_KINDS = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def header_bytes(specs: Specs) -> int:
    """Bytes of the header of one file with these tensors: what the file holds beyond their content."""
    ranks = list(_KINDS)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: (ranks.index(item[1][1]), item[0])):
        end = offset + tensor_bytes(shape, dtype)
        entries[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(entries, separators=(",", ":")).encode())
    return 8 + length + -length % 8


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor's content."""
    return prod(shape) * dtype.itemsize


class Shards:
    """The tensors of a folder, read one at a time and checked against their digests."""

    def __init__(self, folder: Path, checksums: Checksums) -> None:
        self.folder, self.checksums = folder, checksums
        self._stack = ExitStack()
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        if INDEX in checksums:
            names = set(read_checked_json(folder / INDEX, checksums)["weight_map"].values())
        else:
            names = {WHOLE}
        for file in sorted(names):
            self._open(safe_name(file, folder / INDEX))

    def _open(self, file: str) -> None:
        path = self.folder / file
        recorded = self.checksums.get(file)
        if not isinstance(recorded, dict):
            raise MpqError(f"{self.folder} has no checksums of {file}: export again")
        try:
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise MpqError(f"{path} is missing, cut or damaged ({error}): export again") from error
        stored = set(opened.keys())
        for name in recorded:
            if name not in stored:
                raise MpqError(f"{path} lacks the tensor {name}: it is not the file that was exported")
        for name in stored - recorded.keys():
            raise MpqError(f"{path} holds the tensor {name}, which was not exported: it was altered")
        self._files[file] = opened
        self._file_of.update(dict.fromkeys(recorded, file))

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """The tensor; MpqError naming file and tensor when it is not there or not what was exported."""
        file = self._file_of.get(name)
        if file is None:
            raise MpqError(f"{self.folder} has no tensor {name}: it was exported from another model")
        tensor: Tensor = self._files[file].get_tensor(name)  # type: ignore[no-untyped-call]
        recorded = self.checksums[file]
        assert isinstance(recorded, dict)
        if not has_digest(tensor, recorded[name]):
            raise MpqError(f"{self.folder / file}: the tensor {name} is not what was exported (its checksum differs)")
        return tensor


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, and its type."""
    return f"{digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)} {tensor.dtype}"


def has_digest(tensor: Tensor, recorded: str | None) -> bool:
    """Whether this is a tensor's digest; one without a type is of an earlier version."""
    digest = tensor_digest(tensor)
    return recorded in (digest, digest.partition(" ")[0])
