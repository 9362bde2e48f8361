"""Serving checkpoints in vLLM on our kernels: the parts of its linear method that do not need vLLM.

vLLM finds `register` through the entry-point group "vllm.general_plugins". Its models fuse q, k, v and gate, up into
one layer and load the stored tensors of each in turn; rows are then cut by tensor-parallel rank (columns in
row-parallel layers). Rows of one scheme are joined and computed in one product, whether they belong to several matrices
or to one matrix with mixed formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.mix import Mix
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters.shards import has_digest
from mpq.kernels.layout import ASSIGNMENT, Packed, pack, read_assignment, take_rows, tensor_specs, unpack
from mpq.kernels.layout import parts_of as parts_of_mix
from mpq.kernels.mixed import Joint, joint_signature, lookup_in_parts
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
        MpqError: some of the layers that vLLM fuses are quantized and others are not.
    """
    parent, dot, leaf = prefix.rpartition(".")
    names = [prefix] if prefix in layers else [f"{parent}{dot}{name}" for name in fused.get(leaf, ())]
    missing = [name for name in names if name not in layers]
    if len(missing) == len(names):
        return ()
    if missing:
        raise MpqError(f"vLLM fuses {', '.join(names)}, but {missing[0]} is not quantized: quantize it too")
    return tuple(_part(name, layers[name]) for name in names)


def _part(name: str, record: Mapping[str, Any]) -> Part:
    scheme, rows, cols = parse_scheme(record["scheme"]), record["rows"], record["cols"]
    if scheme.mix is not None:  # its tensor says which row has which format
        scheme = replace(scheme, weight=scheme.mix.with_counts(record["counts"]))
    return Part(record.get("stored", name), scheme, rows, cols)


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
        record["stored"]: name
        for name, record in reversed(list(layers.items()))  # its first name is the embedding's
        if record["kind"] == "embedding" and (record["rows"], record["cols"]) == (rows, cols)
    }
    if len(fitting) > 1:
        raise MpqError(
            f"vLLM does not say which embedding of {rows} x {cols} it builds, {' or '.join(sorted(fitting))}: "
            "leave embeddings out of the allocation"
        )
    return next(iter(fitting.values()), "")


class ServedWeight(nn.Module):
    """The parameter that vLLM loads a layer's weight into: collects stored tensors, then holds the packed matrices."""

    places: Tensor  # int64 (rows,): the layer's row at each place of the matrices
    order: Tensor  # its inverse

    def __init__(self, parts: Sequence[Part], cut: Cut, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts, self.cut, self.dtype = tuple(parts), cut, dtype
        self.arrived: list[dict[str, Tensor]] = [{} for _ in parts]
        self.matrices = nn.ModuleList()
        self.activations: list[str] = []
        self.joint: Joint | None = None  # set if one call computes all matrices
        self.is_ordered = True  # whether the concatenated matrices' rows are in the layer's order
        kinds = {name: spec[1] for part in parts for name, spec in _specs(part).items()}
        for name, kind in kinds.items():
            place = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            place.weight_loader = partial(self._take, name)  # type: ignore[attr-defined]
            owner, _, leaf = name.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(leaf, place)

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
        pieces: list[Piece] = []
        first = 0
        for part, tensors, rows in zip(self.parts, self.arrived, self.cut.rows, strict=True):
            for name in _specs(part):
                stored = f"{part.name}.weight.{name}"
                if name not in tensors:
                    raise MpqError(f"the checkpoint has no tensor {stored}: it is incomplete, export again")
                if digests and not has_digest(tensors[name].cpu(), digests.get(stored)):
                    raise MpqError(f"the tensor {stored} is not what was exported (its checksum differs)")
            matrix = Packed(part.scheme.weight, (part.rows, part.cols), tensors={n: tensors[n] for n in _specs(part)})
            pieces += _pieces(matrix, part, rows, self.cut, first)
            first += rows
        for name in [*self._parameters, *(name for name in self._modules if name != "matrices")]:
            delattr(self, name)
        self.arrived = [{} for _ in self.parts]
        joined = _joined(pieces)
        for piece in joined:
            tensors = {name: tensor.to(device) for name, tensor in piece.matrix.tensors.items()}
            weight = PackedWeight(replace(piece.matrix, tensors=tensors), self.dtype)
            weight.arrange()
            self.matrices.append(weight)
            self.activations.append(piece.activation)
        self._place(torch.cat([piece.places for piece in joined]).to(device))

    def _place(self, places: Tensor) -> None:
        """Set the layer's row at each place of the matrices, (rows,)."""
        order = places.argsort()
        self.is_ordered = bool((order == torch.arange(len(order), device=order.device)).all())
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.joint = joint_signature(self._weights()) if len(set(self.activations)) == 1 and len(order) else None

    def _weights(self) -> list[PackedWeight]:
        return [weight for weight in self.matrices if isinstance(weight, PackedWeight)]

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., cols) -> (..., rows of this rank), padding rows give zeros."""
        weights = self._weights()
        if self.joint is not None and len(weights) > 1 and input.device.type == "cpu":
            tensors = [weight.tensors[0] for weight in weights]
            output: Tensor = torch.ops.mpq.linear_parts.default(
                input, tensors, self.places, None, *self.joint, self.activations[0]
            )
        else:
            outputs = [
                weight.linear(input, None, activation)
                for weight, activation in zip(weights, self.activations, strict=True)
            ]
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            output = output if self.is_ordered else output.index_select(-1, self.order)
        missing = sum(self.cut.rows) - output.shape[-1]
        output = functional.pad(output, (0, missing)) if missing else output
        return output if bias is None else output + bias

    def rows(self, indices: Tensor) -> Tensor:
        """(...) -> (..., cols): rows of a vocabulary's table."""
        weights = self._weights()
        return (
            weights[0].lookup(indices)
            if self.is_ordered and len(weights) == 1
            else lookup_in_parts(weights, self.order, indices, self.dtype)
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one format that a rank computes, each for the `places` (rows,) of the layer's outputs."""

    matrix: Packed
    activation: str
    places: Tensor


def _specs(part: Part) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return tensor_specs(part.scheme.weight, part.rows, part.cols)


def _pieces(matrix: Packed, part: Part, rows: int, cut: Cut, start: int) -> list[Piece]:
    """A rank's share of a whole matrix: its rows of each format, whose outputs begin at `start`."""
    activation = "" if part.scheme.activation is None else part.scheme.activation.name
    first, last = _rows_of(part, rows, cut)
    inside = torch.arange(first, last)
    if not isinstance(matrix.format, Mix):
        return [Piece(_share(matrix, inside, part, cut), activation, start + inside - first)]
    mix = read_assignment(matrix.format, matrix.tensors[ASSIGNMENT], part.rows)
    assigned = torch.from_numpy(mix.assigned(part.rows, part.cols))
    pieces = []
    for own in parts_of_mix(matrix):
        whole = (assigned == mix.formats.index(own.format)).nonzero().flatten()
        kept = ((whole >= first) & (whole < last)).nonzero().flatten()
        pieces.append(Piece(_share(own, kept, part, cut), activation, start + whole[kept] - first))
    return [piece for piece in pieces if len(piece.places)]


def _rows_of(part: Part, rows: int, cut: Cut) -> tuple[int, int]:
    """The first of a rank's rows, and the one behind its last."""
    if cut.padded:
        first = min(cut.rank * rows, part.rows)
        return first, min(first + rows, part.rows)
    shares = part.rows // rows
    if shares * rows != part.rows or cut.ranks % shares:
        raise MpqError(f"{part.rows} rows of {part.name} cannot be shared out in {rows} rows to {cut.ranks} ranks")
    first = rows * (cut.rank * shares // cut.ranks)
    return first, first + rows


def _share(matrix: Packed, rows: Tensor, part: Part, cut: Cut) -> Packed:
    """Some rows of a matrix, and the columns that the rank has of them."""
    if len(rows) < matrix.shape[0]:
        matrix = take_rows(matrix, rows)
    if cut.cols == part.cols:
        return matrix
    left = cut.rank * cut.cols
    return pack(_columns(unpack(matrix), slice(left, left + cut.cols), part.name))


def _columns(quantized: Quantized, cols: slice, name: str) -> Quantized:
    format = quantized.format
    shape = (quantized.shape[0], cols.stop - cols.start)
    codes = quantized.codes[:, cols]
    if quantized.scales is None:
        return Quantized(format, shape, codes)
    groups = slice(0, quantized.scales.shape[1])
    if format.granularity == "group":
        size = format.group_size
        if cols.start % size or (cols.stop % size and cols.stop != quantized.shape[1]):
            raise MpqError(f"{shape[1]} columns for each rank cut the groups of {size} in {name}: use fewer ranks")
        groups = slice(cols.start // size, -(-cols.stop // size))
    zeros = None if quantized.zeros is None else quantized.zeros[:, groups]
    return Quantized(format, shape, codes, quantized.scales[:, groups], zeros, quantized.tensor_scale)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces of one scheme whose rows have separate scales."""
    joined: dict[object, Piece] = {}
    for index, piece in enumerate(pieces):
        format = piece.matrix.format
        alone = format.granularity == "tensor" or format.tensor_scale
        key = (format.name, piece.activation, index if alone else -1)
        joined[key] = _below(joined[key], piece) if key in joined else piece
    return list(joined.values())


def _below(upper: Piece, lower: Piece) -> Piece:
    one, other = upper.matrix, lower.matrix
    tensors = {name: torch.cat([one.tensors[name], part]) for name, part in other.tensors.items()}
    matrix = Packed(one.format, (one.shape[0] + other.shape[0], one.shape[1]), tensors=tensors)
    return Piece(matrix, upper.activation, torch.cat([upper.places, lower.places]))
