"""Serving checkpoints in vLLM on our kernels: the parts of its linear method that do not need vLLM.

vLLM finds `register` through the entry-point group "vllm.general_plugins". Its models fuse q, k, v and gate, up into
one layer and load the stored tensors of each in turn; rows are then cut by tensor-parallel rank (columns in
row-parallel layers). Matrices of one scheme are joined and computed in one product, others separately.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters.shards import has_digest
from mpq.kernels.layout import Packed, pack, tensor_specs, unpack
from mpq.kernels.weight import PackedWeight
from mpq.rounding.reference import Quantized

QKV = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of an attention's input layer; others have numbers


def register() -> None:
    """Register checkpoints with quant_method "mpq" in vLLM; may be called repeatedly."""
    import mpq.integrations.vllm_adapter  # noqa: F401


@dataclass(frozen=True)
class Part:
    """One stored matrix of a served layer."""

    name: str  # as in the checkpoint
    scheme: Scheme
    rows: int
    cols: int


@dataclass(frozen=True)
class Cut:
    """The share of a served layer that one tensor-parallel rank holds.

    The rank computes `rows` of each part and `cols`; a `padded` vocabulary table has more rows than are stored. With
    more ranks than shares (key and value heads), neighbouring ranks hold the same rows.
    """

    rows: tuple[int, ...]
    cols: int
    rank: int = 0
    ranks: int = 1
    padded: bool = False


def parts_of(prefix: str, layers: Mapping[str, Any], fused: Mapping[str, Sequence[str]]) -> tuple[Part, ...]:
    """The stored matrices of the served layer `prefix`, in vLLM's order; empty when it is not quantized.

    Args:
        prefix: the layer's name in vLLM.
        layers: "layers" of our checkpoint's `quantization_config`, by their names in vLLM.
        fused: vLLM's `packed_modules_mapping`, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.

    Raises:
        MpqError: some of the layers that vLLM fuses are quantized and others are not, or one mixes formats by rows.
    """
    parent, dot, leaf = prefix.rpartition(".")
    names = [prefix] if prefix in layers else [f"{parent}{dot}{name}" for name in fused.get(leaf, ())]
    missing = [name for name in names if name not in layers]
    if len(missing) == len(names):
        return ()
    if missing:
        raise MpqError(
            f"vLLM computes {', '.join(names)} as one, but {missing[0]} is not quantized: give it a format too"
        )
    records = [layers[name] for name in names]
    for name, fact in zip(names, records, strict=True):
        if parse_scheme(fact["scheme"]).mix is not None:
            raise MpqError(f"{name} mixes formats by rows, which vLLM does not compute yet: profile with layers whole")
    return tuple(
        Part(fact.get("stored", name), parse_scheme(fact["scheme"]), fact["rows"], fact["cols"])
        for name, fact in zip(names, records, strict=True)
    )


def named_layers(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of a `quantization_config` by all of their names; "stored" is the name of their tensors."""
    return {
        name: {**record, "stored": layer} for layer, record in layers.items() for name in (layer, *record["aliases"])
    }


def embedding_named(prefix: str, layers: Mapping[str, Any], rows: int, cols: int) -> str:
    """The name of an embedding of vLLM's, which most of its models build without one: that of the only stored embedding
    of its size, "" where there is none.

    Raises:
        MpqError: several fit.
    """
    if prefix:
        return prefix
    fitting = {
        facts["stored"]: name
        for name, facts in reversed(list(layers.items()))  # its first name is the embedding's
        if facts["kind"] == "embedding" and (facts["rows"], facts["cols"]) == (rows, cols)
    }
    if len(fitting) > 1:
        raise MpqError(
            f"vLLM does not say which embedding of {rows} x {cols} it builds, {' or '.join(sorted(fitting))}: "
            "leave embeddings out of the allocation"
        )
    return next(iter(fitting.values()), "")


class ServedWeight(nn.Module):
    """The parameter that vLLM loads a layer's weight into: collects stored tensors, then holds the packed matrices."""

    def __init__(self, parts: Sequence[Part], cut: Cut, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts, self.cut, self.dtype = tuple(parts), cut, dtype
        self.arrived: list[dict[str, Tensor]] = [{} for _ in parts]
        self.matrices = nn.ModuleList()
        self.activations: list[str] = []
        kinds = {name: spec[1] for part in parts for name, spec in _specs(part).items()}
        for name, kind in kinds.items():
            place = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            place.weight_loader = partial(self._take, name)  # type: ignore[attr-defined]
            self.register_parameter(name, place)

    def _take(self, name: str, place: Tensor, loaded_weight: Tensor, loaded_shard_id: int | str | None = None) -> None:
        """vLLM's weight loader: keep a stored tensor of one part until all are loaded."""
        index = QKV[loaded_shard_id] if isinstance(loaded_shard_id, str) else loaded_shard_id or 0
        part = self.parts[index]
        spec = _specs(part).get(name)
        if spec is None or (tuple(loaded_weight.shape), loaded_weight.dtype) != spec:
            actual = f"{loaded_weight.dtype} {tuple(loaded_weight.shape)}"
            raise MpqError(f"the tensor {part.name}.weight.{name} is {actual}: expected a tensor of {part.scheme.name}")
        self.arrived[index][name] = loaded_weight

    def settle(self, device: torch.device | str, digests: Mapping[str, str] | None = None) -> None:
        """Check, cut, join and arrange the loaded tensors; may be called repeatedly.

        Raises:
            MpqError: a tensor is missing or was altered (named), or the cut divides a group.
        """
        if len(self.matrices):
            return
        shares: list[Packed] = []
        for part, tensors, rows in zip(self.parts, self.arrived, self.cut.rows, strict=True):
            for name in _specs(part):
                stored = f"{part.name}.weight.{name}"
                if name not in tensors:
                    raise MpqError(f"the checkpoint has no tensor {stored}: it is incomplete, export again")
                if digests and not has_digest(tensors[name].cpu(), digests.get(stored)):
                    raise MpqError(f"the tensor {stored} is not what was exported (its checksum differs)")
            ordered = {name: tensors[name] for name in _specs(part)}
            matrix = Packed(part.scheme.weight, (part.rows, part.cols), tensors=ordered)
            shares.append(_share(matrix, part, rows, self.cut))
        activations = [part.scheme.activation for part in self.parts]
        for name in list(self._parameters):
            delattr(self, name)
        self.arrived = [{} for _ in self.parts]
        for packed, activation in _joined(shares, activations):
            weight = PackedWeight(
                replace(packed, tensors={k: v.to(device) for k, v in packed.tensors.items()}), self.dtype
            )
            weight.arrange()
            self.matrices.append(weight)
            self.activations.append("" if activation is None else activation.name)

    def _weights(self) -> list[PackedWeight]:
        return [weight for weight in self.matrices if isinstance(weight, PackedWeight)]

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., cols) -> (..., rows of this rank), padding rows give zeros."""
        outputs = [
            torch.ops.mpq.linear.default(input, weight.tensors, None, *weight.signature, activation)
            for weight, activation in zip(self._weights(), self.activations, strict=True)
        ]
        output: Tensor = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        missing = sum(self.cut.rows) - output.shape[-1]
        output = functional.pad(output, (0, missing)) if missing else output
        return output if bias is None else output + bias

    def rows(self, indices: Tensor) -> Tensor:
        """(...) -> (..., cols): rows of a vocabulary's table."""
        (weight,) = self._weights()
        picked: Tensor = torch.ops.mpq.embedding.default(indices, weight.tensors, *weight.signature, self.dtype)
        return picked


def _specs(part: Part) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return tensor_specs(part.scheme.weight, part.rows, part.cols)


def _share(matrix: Packed, part: Part, rows: int, cut: Cut) -> Packed:
    """A rank's share of a whole matrix."""
    if cut.padded:
        first = min(cut.rank * rows, part.rows)
        last = min(first + rows, part.rows)
    else:
        shares = part.rows // rows
        if shares * rows != part.rows or cut.ranks % shares:
            raise MpqError(f"{part.rows} rows of {part.name} cannot be shared out in {rows} rows to {cut.ranks} ranks")
        first = rows * (cut.rank * shares // cut.ranks)
        last = first + rows
    if (last - first, cut.cols) == (part.rows, part.cols):
        return matrix
    left = cut.rank * cut.cols if cut.cols != part.cols else 0
    return pack(_block(unpack(matrix), slice(first, last), slice(left, left + cut.cols), part.name))


def _block(quantized: Quantized, rows: slice, cols: slice, name: str) -> Quantized:
    format = quantized.format
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    codes = quantized.codes[rows, cols]
    if quantized.scales is None:
        return Quantized(format, shape, codes)
    groups = slice(0, quantized.scales.shape[1])
    if format.granularity == "group" and shape[1] != quantized.shape[1]:
        size = format.group_size
        if cols.start % size or (cols.stop % size and cols.stop != quantized.shape[1]):
            raise MpqError(f"{shape[1]} columns for each rank cut the groups of {size} in {name}: use fewer ranks")
        groups = slice(cols.start // size, -(-cols.stop // size))
    scaled = slice(None) if format.granularity == "tensor" else rows
    zeros = None if quantized.zeros is None else quantized.zeros[scaled, groups]
    return Quantized(format, shape, codes, quantized.scales[scaled, groups], zeros, quantized.tensor_scale)


def _joined(shares: Sequence[Packed], activations: Sequence[Any]) -> list[tuple[Packed, Any]]:
    """Join neighbours of one scheme whose rows have separate scales."""
    joined: list[tuple[Packed, Any]] = []
    for packed, activation in zip(shares, activations, strict=True):
        format = packed.format
        alike = bool(joined) and (joined[-1][0].format, joined[-1][1]) == (format, activation)
        if alike and format.granularity != "tensor" and not format.tensor_scale:
            last = joined.pop()[0]
            tensors = {name: torch.cat([last.tensors[name], part]) for name, part in packed.tensors.items()}
            packed = Packed(format, (last.shape[0] + packed.shape[0], packed.shape[1]), tensors=tensors)
        joined.append((packed, activation))
    return joined
