"""GGUF, the file of llama.cpp: each layer in the tensor type that holds exactly its format's values."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.exporters.folder import copy_side_files, digest, names_of, refuse_foreign, write_checksums, write_folder
from mpq.exporters.gguf.architectures import architecture_of, check_config, describe, further_tensors, row_order
from mpq.exporters.gguf.blocks import encode_blocks, raw_copy, type_of
from mpq.exporters.gguf.reader import gguf_package, read_tensors
from mpq.exporters.gguf.tokenizer import describe_tokenizer
from mpq.exporters.holding import check, check_model
from mpq.exporters.mpq.state import other_state
from mpq.exporters.request import ExportRequest
from mpq.exporters.shards import SHARD
from mpq.exporters.targets import TARGETS
from mpq.exporters.verify import same_numbers
from mpq.quantized import checked_layers
from mpq.rounding.codes import COPY_DTYPES
from mpq.rounding.reference import Quantized, dequantize

FILE = "model.gguf"
EXPERT = re.compile(r"(?P<stack>.*\.experts)\.\d+\.(?P<matrix>\w+)")
Numbers: TypeAlias = Tensor | list[Quantized]  # a tensor's values, or its matrices
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, and shape and type as ggml stores it."""

    name: str
    shape: tuple[int, ...]  # in bytes if the type is ggml's own
    dtype: Any  # numpy's
    nbytes: int
    kind: Any  # ggml's type, None where numpy's says it


def export(request: ExportRequest) -> Path:
    """Write a transformers model as `model.gguf`, or `model-00001-of-0000N.gguf` and so on; the folder.

    Without a tokenizer (`describe_tokenizer` says which are known) the file has no vocabulary: llama.cpp then takes
    and gives tokens alone. Of several files llama.cpp opens the first.

    Raises:
        MpqError: an architecture that llama.cpp computes otherwise, a scheme without a tensor type, experts of one
            stack in several schemes, the package gguf is missing.
    """
    model, allocation, shard = request.model, request.allocation, request.shard
    check_model(TARGETS["gguf"], model)
    check(TARGETS["gguf"], allocation)
    gguf = gguf_package()
    check_config(model.config)
    refuse_foreign(request.folder, (FILE, "allocation.json", *names_of(request.side_files)))
    plan = _plan(model, allocation, gguf)
    with write_folder(request.folder) as draft:
        writer = _begun(draft / FILE, plan, model, request.tokenizer, gguf, shard)
        try:
            files = [path.name for path in writer.format_shard_names(draft / FILE)]
            holders = [file for file, written in zip(files, writer.tensors, strict=True) for _ in written]
            digests: dict[str, dict[str, str]] = {file: {} for file in files}
            numbers: dict[str, Numbers] = {}  # by the file's names
            contents = _contents(request, gguf)
            for entry, file, (content, kept) in zip(plan, holders, contents, strict=True):
                numbers[entry.name] = kept
                writer.write_tensor_data(content)
                digests[file][entry.name] = digest(content.data)
        finally:
            writer.close()
        copy_side_files(draft, request.side_files)
        allocation.save(draft / "allocation.json")
        write_checksums(draft, digests)
        _read_back(draft, plan, numbers)
    return request.path


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """Bytes of model.gguf, header and vocabulary included, before anything is rounded; shards count as one file."""
    gguf = gguf_package()
    check_config(model.config)

    @cache
    def header(layers: tuple[Layer, ...]) -> int:
        """Bytes before the tensors, independent of the formats."""
        blank = Allocation(layers, ("fp32",) * len(layers))
        with TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            _begun(path, _plan(model, blank, gguf), model, tokenizer, gguf, SHARD).close()
            return path.stat().st_size

    def size(allocation: Allocation) -> int:
        entries = _plan(model, allocation, gguf)
        aligned = gguf.GGUFWriter.ggml_pad
        filled = [aligned(entry.nbytes, gguf.GGUF_DEFAULT_ALIGNMENT) for entry in entries]
        return int(aligned(header(allocation.layers), gguf.GGUF_DEFAULT_ALIGNMENT) + sum(filled))

    return size


def _begun(path: Path, plan: list[Entry], model: nn.Module, tokenizer: Any, gguf: Any, shard: int) -> Any:
    """The writer of a file, with the header and all metadata written."""
    config: Any = model.config
    split = {"split_max_size": shard} if sum(entry.nbytes for entry in plan) > shard else {}
    writer = gguf.GGUFWriter(path, architecture_of(config).name, **split)
    try:
        describe(writer, config, gguf)
        describe_tokenizer(writer, tokenizer, config.vocab_size, gguf)
        for entry in plan:
            writer.add_tensor_info(entry.name, entry.shape, entry.dtype, entry.nbytes, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        writer.close()
        raise
    return writer


def _plan(model: nn.Module, allocation: Allocation, gguf: Any) -> list[Entry]:
    """Every tensor in the order of `_contents`, before anything is rounded."""
    config: Any = model.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture_of(config).name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    plan = [_entry(name, tensor, gguf) for name, tensor in further_tensors(config).items()]
    for name, tensor in other_state(model, allocation)[0].items():
        stem, _, ending = name.rpartition(".")
        plan.append(_entry(f"{_translated(names, stem)}.{ending}", tensor, gguf))
    for name, members in _stacked((layer.name, (layer, scheme)) for layer, scheme in checked_layers(model, allocation)):
        layer, scheme = members[0]
        if any(other != scheme for _, other in members):
            raise MpqError(
                f"llama.cpp keeps the experts {name} in one tensor, so they must share a scheme: leave ties on"
            )
        dtype, kind = type_of(scheme.weight, gguf)
        size = scheme.weight.nbytes(layer.rows, layer.cols)
        stack = (len(members),) if name != layer.name else ()
        shape = (*stack, layer.rows, size // layer.rows // dtype.itemsize)
        plan.append(Entry(f"{_translated(names, name)}.weight", shape, dtype, size * len(members), kind))
    return plan


def _entry(name: str, tensor: Tensor, gguf: Any) -> Entry:
    """The plan of a tensor that is not quantized."""
    content, kind = raw_copy(torch.empty(0, dtype=_stored_type(tensor)), gguf)
    shape, itemsize = tuple(tensor.shape), _stored_type(tensor).itemsize
    if kind is not None:  # a ggml type, which numpy stores as bytes
        shape = (*shape[:-1], shape[-1] * itemsize)
    return Entry(name, shape, content.dtype, tensor.numel() * itemsize, kind)


def _contents(request: ExportRequest, gguf: Any) -> Iterator[tuple[NDArray[Any], Numbers]]:
    """The bytes of every tensor, and the values that they encode."""
    config: Any = request.model.config
    for tensor in further_tensors(config).values():
        yield tensor.numpy(), tensor
    for name, tensor in other_state(request.model, request.allocation)[0].items():
        rows = row_order(name.rpartition(".")[0], config)
        values = tensor.detach().to(_stored_type(tensor))
        values = values if rows is None else values[rows]
        if name.endswith("norm.weight"):
            values = values + architecture_of(config).norm_shift
        yield raw_copy(values, gguf)[0], values
    for name, members in _stacked((layer.name, quantized) for layer, _, quantized in request.rounded()):
        rows = row_order(name, config)
        ordered = [quantized if rows is None else _rows_of(quantized, rows) for quantized in members]
        contents = [encode_blocks(quantized, gguf) for quantized in ordered]
        yield np.concatenate(contents), ordered


def _stacked(layers: Iterable[tuple[str, T]]) -> Iterator[tuple[str, list[T]]]:
    """Layers by the name of their tensor: the experts of a block share one tensor for each matrix, in order."""
    waiting: dict[str, dict[str, list[T]]] = {}
    for name, value in layers:
        expert = EXPERT.fullmatch(name)
        if expert is None:
            yield from _complete(waiting)
            yield name, [value]
        else:
            if expert["stack"] not in waiting:
                yield from _complete(waiting)
            waiting.setdefault(expert["stack"], {}).setdefault(f"{expert['stack']}.{expert['matrix']}", []).append(
                value
            )
    yield from _complete(waiting)


def _complete(waiting: dict[str, dict[str, list[T]]]) -> Iterator[tuple[str, list[T]]]:
    for stacks in waiting.values():
        yield from stacks.items()
    waiting.clear()


def _read_back(draft: Path, plan: list[Entry], numbers: dict[str, Numbers]) -> None:
    """MpqError if the file holds other tensors than planned, or gguf's dequantizer reads other values."""
    names_read = set()
    for name, tensor in read_tensors(draft):
        expected = numbers.pop(name)
        if not isinstance(expected, Tensor):
            expected = torch.stack([dequantize(quantized) for quantized in expected])
            expected = expected if tensor.ndim == 3 else expected[0]
        same_numbers(name, tensor, expected)
        names_read.add(name)
    if names_read != {entry.name for entry in plan}:
        raise MpqError(f"the GGUF file holds {len(names_read)} tensors of {len(plan)}: nothing was written")


def _stored_type(tensor: Tensor) -> torch.dtype:
    """The type of a tensor that is not quantized: float32 for vectors, as llama.cpp requires."""
    return tensor.dtype if tensor.ndim > 1 and tensor.dtype in COPY_DTYPES.values() else torch.float32


def _translated(names: Any, name: str) -> str:
    ggml_name = names.get_name(name)
    if ggml_name is None:
        raise MpqError(f"llama.cpp has no tensor {name} in this architecture: export to mpq instead")
    return str(ggml_name)


def _rows_of(quantized: Quantized, rows: Tensor) -> Quantized:
    by_row = quantized.map_tables(lambda name, table: table[rows])
    return replace(by_row, codes=quantized.codes[rows])
