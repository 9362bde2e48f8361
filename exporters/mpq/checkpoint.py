"""Our own checkpoint: packed weights in safetensors, and a loader that computes from them.

A folder holds model.safetensors (or shards and an index), config.json (a Hugging Face config where the model has one)
with a `quantization_config`, allocation.json and checksums.json. A layer's tensors are named `<layer>.weight.packed`,
`.scale`, `.zeros`, `.tensor_scale` (`mpq.kernels.layout`), everything else as in the model's state dict. A tensor that
several modules share is stored once.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError, expect
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters.folder import (
    check_texts,
    copy_side_files,
    names_of,
    read_checksums,
    read_json,
    refuse_foreign,
    write_checksums,
    write_folder,
)
from mpq.exporters.mpq.skeleton import build_skeleton, describes_itself
from mpq.exporters.mpq.state import model_config, other_state, specs_of, write_config
from mpq.exporters.request import ExportRequest
from mpq.exporters.shards import WHOLE, Shards, Specs, header_bytes, tensor_bytes, write_tensors
from mpq.exporters.verify import Digests, noting, verify
from mpq.generation.serving import serve_cache
from mpq.kernels.layout import Packed, pack, tensor_specs
from mpq.network.copies import copied
from mpq.network.prepare import bake, bakes, prepared
from mpq.quantized import checked_layers, put_packed
from mpq.sources import check_device

METHOD, VERSION = "mpq", 1
FILES = (WHOLE, "config.json", "allocation.json")  # what every export writes


def export(request: ExportRequest) -> Path:
    """Round and pack the model's layers and write them with all its other tensors; the folder.

    The model is read back and compared with the simulated one, layer by layer if the request has inputs, else tensor by
    tensor.

    Raises:
        MpqError: the allocation is another model's, a weight cannot be rounded, the folder holds foreign files, or
            the model that is read back differs: nothing is written then.
    """
    refuse_foreign(request.folder, (*FILES, *names_of(request.side_files)))
    model, rounding = prepared(request.model), request.rounding
    allocation = replace(request.allocation, provenance={**request.allocation.provenance, "rounding": rounding})
    request = replace(request, model=model, allocation=allocation)
    others, tied = other_state(model, allocation)
    config = model_config(model)
    if request.recipe is not None and request.recipe.get("kind") != "transformers":  # rebuilt from their config
        config["recipe"] = dict(request.recipe)
    config["quantization_config"] = {
        "quant_method": METHOD,
        "version": VERSION,
        "rounding": rounding,
        "layers": {layer.name: _layer_record(model, layer, allocation) for layer in allocation.layers},
        "tied": tied,
        **({"cache": allocation.cache.to_json()} if allocation.cache is not None else {}),
    }

    rounded: Digests = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from others.items()
        for layer, _, quantized in noting(request.rounded(), rounded):
            for name, tensor in pack(quantized).tensors.items():
                yield f"{layer.name}.weight.{name}", tensor

    with write_folder(request.folder) as draft:
        digests = write_tensors(draft, tensor_plan(model, allocation), tensors(), request.shard)
        write_config(draft, config, model)
        copy_side_files(draft, request.side_files)
        allocation.save(draft / "allocation.json")
        write_checksums(draft, digests)
        loaded = _read_back(draft, model, config)
        verify(model, loaded, allocation, rounded, others, request.comparison)
    return request.path


def _read_back(draft: Path, model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """The written model, built from the folder as `load` does, if the folder describes it."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    structure = None
    if not describes_itself(config):
        tensors = itertools.chain(model.parameters(), model.buffers())
        structure = copied(model, {id(tensor): tensor for tensor in tensors})  # all of them are replaced
    try:
        return load(draft, model=structure, device=device, trust=True)
    except MpqError as error:
        raise MpqError(f"the written model cannot be loaded, and was removed: {error}") from error


def file_size(model: nn.Module, allocation: Allocation) -> int:
    """Bytes that model.safetensors will have, header included, before anything is rounded; shards count as one file."""
    specs = tensor_plan(model, allocation)
    return header_bytes(specs) + sum(tensor_bytes(*spec) for spec in specs.values())


def sizer(model: nn.Module, tokenizer: Any = None, inputs: Any = None) -> Callable[[Allocation], int]:
    """`file_size` of a model, as a target's sizer."""
    return partial(file_size, model)


def tensor_plan(model: nn.Module, allocation: Allocation) -> Specs:
    """Shape and type of every stored tensor, in order; MpqError when the allocation is another model's."""
    model = prepared(model)
    others, _ = other_state(model, allocation)
    specs = specs_of(others)
    for layer, scheme in checked_layers(model, allocation):
        for name, spec in tensor_specs(scheme.weight, layer.rows, layer.cols).items():
            specs[f"{layer.name}.weight.{name}"] = spec
    return specs


def _layer_record(model: nn.Module, layer: Layer, allocation: Allocation) -> dict[str, Any]:
    weight: Tensor = model.get_submodule(layer.name).weight  # type: ignore[assignment]
    scheme = allocation.scheme_of[layer.name]
    record = {
        "scheme": scheme.name,
        **({} if scheme.mix is None else {"counts": scheme.mix.counts(layer.rows, layer.cols)}),
        "kind": layer.kind,
        "rows": layer.rows,
        "cols": layer.cols,
    }
    return {**record, "dtype": str(weight.dtype).removeprefix("torch."), "aliases": list(layer.aliases)}


def load(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> nn.Module:
    """The model of an exported folder, in evaluation mode, computing from packed weights.

    Args:
        folder: what `export` wrote.
        model: the same architecture with any weights, which are replaced in place once all is read and checked; needed
            if the folder does not describe how to build it.
        device: where to.
        trust: whether the folder may name a function of the user to be imported and called.

    Raises:
        MpqError: the folder is no export, it is incomplete or altered (file and tensor named), or the model differs.
    """
    path = Path(folder)
    expect(model, (nn.Module, NoneType), "a torch.nn.Module as the model")
    check_device(device)
    if not path.is_dir():
        raise MpqError(f"{path} is not a folder: expected one written by mpq.export")
    quantization = read_json(path / "config.json").get("quantization_config") or {}
    kind = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if kind != METHOD:
        raise MpqError(f"{path} is not a checkpoint of mpq: its quant_method is {kind!r}")
    if quantization.get("version") != VERSION:
        raise MpqError(f"{path} has version {quantization.get('version')}, this mpq reads {VERSION}: update mpq")
    checksums = read_checksums(path)
    check_texts(path, checksums)
    config = read_json(path / "config.json")
    allocation, dtypes = layers_of(config["quantization_config"])
    with Shards(path, checksums) as shards:
        built = (
            build_skeleton(config, path, trust, set(shards)) if model is None else getattr(model, "_orig_mod", model)
        )
        stored = set(shards)
        apart = model is not None and bakes(built, stored)  # the caller's model is not changed until all is checked
        skeleton = bake(copied(built) if apart else built, stored)
        matrices = []
        for layer, scheme in checked_layers(skeleton, allocation):
            specs = tensor_specs(scheme.weight, layer.rows, layer.cols)
            tensors = {name: _checked(shards, f"{layer.name}.weight.{name}", *specs[name]).to(device) for name in specs}
            matrices.append((layer, scheme, Packed(scheme.weight, (layer.rows, layer.cols), tensors=tensors)))
        others, links = _others(skeleton, allocation, shards, quantization["tied"], device)
    if apart:
        skeleton = bake(built, stored)
    for layer, scheme, matrix in matrices:
        put_packed(skeleton, layer, scheme, matrix, dtypes[layer.name])
    for name, tensor in others.items():
        parent, _, leaf = name.rpartition(".")
        setattr(skeleton.get_submodule(parent), leaf, tensor)
    for name, weight in links.items():
        parent, _, leaf = name.rpartition(".")
        vars(skeleton.get_submodule(parent))["_parameters"].pop(leaf, None)
        setattr(skeleton.get_submodule(parent), leaf, skeleton.get_submodule(weight))
    serve_cache(skeleton, allocation.cache)
    return skeleton.to(device).eval()


def layers_of(quantization: Mapping[str, Any]) -> tuple[Allocation, dict[str, torch.dtype]]:
    """Layers with their schemes, formats of the cache, and the types of the layers' numbers, of a quantization_config.

    For mixes it holds the number of rows in each format; the assignment is a tensor of the weight.
    """
    layers, schemes, dtypes = [], [], {}
    assignments: dict[str, str] = {}
    for name, record in quantization["layers"].items():
        layers.append(Layer(name, record["kind"], record["rows"], record["cols"], aliases=tuple(record["aliases"])))
        schemes.append(record["scheme"])
        if (mix := parse_scheme(record["scheme"]).mix) is not None:
            assignments[name] = mix.with_counts(record["counts"]).assignment
        dtypes[name] = getattr(torch, record["dtype"])
    cache = CacheFormats.from_json(quantization["cache"]) if quantization.get("cache") else None
    return Allocation(tuple(layers), tuple(schemes), assignments=assignments, cache=cache), dtypes


def _checked(shards: Shards, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    tensor = shards.read(name)
    if tuple(tensor.shape) != shape or tensor.dtype != (dtype or tensor.dtype):
        actual = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise MpqError(f"{shards.folder}: the tensor {name} is {actual}, not {dtype or 'of shape'} {shape}")
    return tensor


def _is_part(name: str, weights: set[str]) -> bool:
    """Whether a tensor is one of a packed weight's, or of a part of one."""
    owner = name.rpartition(".")[0]
    return owner in weights or owner.rpartition(".")[0] in weights


def _others(
    model: nn.Module, allocation: Allocation, shards: Shards, tied: Mapping[str, str], device: str | torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every other tensor of the files by its place in the model, with sharing restored; and the parameters that are
    packed weights under other names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {f"{name}.weight" for layer in allocation.layers for name in layer.names}
    put: dict[str, Tensor] = {}
    links: dict[str, str] = {}
    for name in [*(name for name in shards if not _is_part(name, packed)), *tied]:
        parent, _, leaf = name.rpartition(".")
        if tied.get(name) in packed:
            if name not in packed and parent in modules:
                links[name] = tied[name]
            continue
        old = getattr(modules.get(parent), leaf, None)
        if not isinstance(old, Tensor):
            raise MpqError(f"{shards.folder} holds the tensor {name}, which the model does not have")
        if name in tied:
            put[name] = put[tied[name]]
        else:
            tensor = _checked(shards, name, tuple(old.shape)).to(device)
            trained = isinstance(old, nn.Parameter)
            put[name] = nn.Parameter(tensor, tensor.is_floating_point() and old.requires_grad) if trained else tensor
    for name in model.state_dict():
        if name not in put and name not in packed and name not in links:
            raise MpqError(f"{shards.folder} has no tensor {name}, which the model needs")
    return put, links
