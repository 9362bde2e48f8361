"""A transformers model's folder in a server's own layout: what compressed-tensors and GPTQ checkpoints share."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.scheme import Scheme
from mpq.exporters.folder import (
    copy_side_files,
    names_of,
    read_checksums,
    refuse_foreign,
    write_checksums,
    write_folder,
)
from mpq.exporters.fused import shared_scales, with_shared_scale
from mpq.exporters.holding import check, check_model
from mpq.exporters.mpq.state import model_config, other_state, specs_of, write_config
from mpq.exporters.request import ExportRequest
from mpq.exporters.shards import WHOLE, Shards, Specs, header_bytes, tensor_bytes, write_tensors
from mpq.exporters.targets import TARGETS
from mpq.exporters.verify import same_numbers, same_tensor
from mpq.kernels.layout import Packed, empty, pack
from mpq.network.layers import own_code
from mpq.quantized import checked_layers
from mpq.rounding.reference import Quantized, dequantize

Named: TypeAlias = Callable[[str, Packed, Scheme], Mapping[str, Tensor]]  # a layer's tensors, by the file's names
# A layer's scheme and tensors, without its name -> its values (rows, cols), and their largest relative error.
Read: TypeAlias = Callable[[Scheme, Mapping[str, Tensor]], tuple[Tensor, float]]


def export_transformers(
    consumer: str,
    request: ExportRequest,
    named: Named,
    config: Callable[[], Mapping[str, Any]],
    read: Read,
    own_models: bool = False,
    texts: Callable[[], Mapping[str, str]] = dict,
) -> Path:
    """Write the folder of a consumer that reads transformers models; the folder.

    Args:
        consumer: a name of `TARGETS`, whose rules are checked first.
        named: the tensors, by their names in the file, of a layer's packed weight, which may have no data.
        config: additional entries of config.json, called after the allocation has passed the rules.
        read: the consumer's own reader of those tensors, with which the folder is verified.
        own_models: the consumer has its own code for transformers' architectures, special layers included.
        texts: further text files of the folder by name, called like `config`.

    Raises:
        MpqError: no transformers model, a scheme that cannot be held, fused layers in several schemes, foreign files,
            or numbers that read back changed.
    """
    model, allocation = request.model, request.allocation
    check_model(TARGETS[consumer], model)
    check(TARGETS[consumer], allocation)
    further = texts()
    refuse_foreign(request.folder, (WHOLE, "config.json", "allocation.json", *further, *names_of(request.side_files)))
    shared = shared_scales(model, allocation) if TARGETS[consumer].fuses else {}
    others, _ = other_state(model, allocation)
    rounded: dict[str, Quantized] = {}
    for layer, scheme in checked_layers(model, allocation):
        module = model.get_submodule(layer.name)
        known = own_models and type(module).__module__.startswith("transformers.models.")
        if own_code(module) and not known and not scheme.weight.is_float_copy:
            raise MpqError(
                f"layer {layer.name} is a {type(module).__name__} with a custom forward, which {consumer} would "
                "replace: exclude it, or export to mpq"
            )
    names, specs = plan(model, allocation, others, named)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from others.items()
        for layer, scheme, quantized in request.rounded():
            quantized = with_shared_scale(layer.name, quantized, shared)
            rounded[layer.name] = quantized
            yield from named(layer.name, pack(quantized), scheme).items()

    with write_folder(request.folder) as draft:
        digests = write_tensors(draft, specs, tensors(), request.shard)
        write_config(draft, {**model_config(model), **config()}, model)
        for name, text in further.items():
            (draft / name).write_text(text, encoding="utf-8")
        copy_side_files(draft, request.side_files)
        allocation.save(draft / "allocation.json")
        write_checksums(draft, digests)
        with Shards(draft, read_checksums(draft)) as shards:
            for name, tensor in others.items():
                same_tensor(name, shards.read(name), tensor.detach())
            for layer, scheme in checked_layers(model, allocation):
                tensors_of = {name.removeprefix(f"{layer.name}."): shards.read(name) for name in names[layer.name]}
                copy = scheme.weight.is_float_copy
                numbers, relative = (tensors_of["weight"], 0.0) if copy else read(scheme, tensors_of)
                same_numbers(layer.name, numbers, dequantize(rounded.pop(layer.name)), relative)
    return request.path


def plan(
    model: nn.Module, allocation: Allocation, others: Mapping[str, Tensor], named: Named
) -> tuple[dict[str, list[str]], Specs]:
    """The names of each layer's tensors, and shape and type of every tensor of the file, in order."""
    specs = specs_of(others)
    names: dict[str, list[str]] = {}
    for layer, scheme in checked_layers(model, allocation):
        own = specs_of(named(layer.name, empty(scheme.weight, layer.rows, layer.cols, "meta"), scheme))
        names[layer.name] = list(own)
        specs.update(own)
    return names, specs


def sizer_of(model: nn.Module, named: Named) -> Callable[[Allocation], int]:
    """Bytes that model.safetensors will have, header included, before anything is rounded; shards count as one file."""

    def size(allocation: Allocation) -> int:
        _, specs = plan(model, allocation, other_state(model, allocation)[0], named)
        return header_bytes(specs) + sum(tensor_bytes(*spec) for spec in specs.values())

    return size
