"""Packed weights of mixes: a packed weight for the rows of each format, and the order of the rows.

On CPUs a product is one call, in which each part writes to its rows' places; elsewhere the parts' products are
reordered.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mpq.core.mix import Mix
from mpq.kernels import reference
from mpq.kernels.cpu import panels
from mpq.kernels.layout import ASSIGNMENT, Packed, of_parts, parts_of, read_assignment
from mpq.kernels.weight import PackedWeight, Spatial

_linear_parts = torch.ops.mpq.linear_parts.default

LAYOUT = "parts"  # each in a layout of its own
Joint: TypeAlias = tuple[str, list[int], int, str]  # the signature of parts that one call computes


def joint_signature(parts: Sequence[PackedWeight]) -> Joint | None:
    """The arguments for computing all parts in one compiled call; None where they need separate calls."""
    if not all(part.layout == panels.NAME and len(part.tensors) == 1 for part in parts):
        return None
    formats = "/".join(part.format.name for part in parts)
    return formats, [part.rows for part in parts], parts[0].cols, panels.NAME


def lookup_in_parts(parts: Sequence[PackedWeight], order: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix in parts, (...) -> (..., cols); row i stands at place `order[i]` of them."""
    places, start = order[indices], 0
    if indices.numel() == 1 and indices.device.type == "cpu" and not torch.compiler.is_compiling():
        for part in parts:  # a generated token: one part instead of all
            if places < start + part.rows:
                return part.lookup(places - start)
            start += part.rows
    rows = torch.zeros((*indices.shape, parts[0].cols), dtype=dtype, device=indices.device)
    for part in parts:
        own = (places - start).clamp(0, part.rows - 1)
        inside = (places >= start) & (places < start + part.rows)
        rows = torch.where(inside.unsqueeze(-1), part.lookup(own), rows)
        start += part.rows
    return rows


class MixedWeight(PackedWeight):
    """A weight matrix of parts; behaves as a `PackedWeight`. Parts are children named by their format's place."""

    order: Tensor  # int64 (rows,): position of each row in the concatenated parts
    places: Tensor  # int64 (rows,): its inverse, the row at each position
    joint: Joint | None = None

    def _put(self, packed: Packed) -> None:
        assert isinstance(packed.format, Mix)
        self.rows, self.cols = packed.shape
        self.layout, self.signature = LAYOUT, (packed.format.name, *packed.shape, LAYOUT)
        self.register_buffer(ASSIGNMENT, packed.tensors[ASSIGNMENT])
        for part in parts_of(packed):
            self.add_module(str(packed.format.formats.index(part.format)), PackedWeight(part, self.dtype))
        self._arrange_rows(packed.format)

    def _arrange_rows(self, mix: Mix) -> None:
        stored: Tensor = self.get_buffer(ASSIGNMENT)
        self.format = mix
        places = order = torch.zeros(self.rows, dtype=torch.int64, device=stored.device)
        if not stored.is_meta:
            self.format = read_assignment(mix, stored, self.rows)
            places = torch.from_numpy(self.format.assigned(self.rows, self.cols)).argsort(stable=True).to(stored.device)
            order = places.argsort()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.joint = joint_signature(self.parts)

    @property
    def parts(self) -> list[PackedWeight]:
        """The rows of each format."""
        return list(self.children())  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all parts."""
        return [tensor for part in self.parts for tensor in part.tensors]

    def matrix(self) -> Packed:
        """Format, shape and tensors as one value, canonical."""
        assert isinstance(self.format, Mix)
        return of_parts(self.format, (self.rows, self.cols), [part.matrix() for part in self.parts])

    def arrange(self, layout: str | None = None) -> None:
        """Change the layout of every part, after updating the order from a newly loaded assignment."""
        assert isinstance(self.format, Mix)
        for part in self.parts:
            part.arrange(layout)
        self._arrange_rows(self.format)

    def dequantize(self) -> Tensor:
        """The weight matrix, float32 (rows, cols)."""
        return torch.cat([part.dequantize() for part in self.parts])[self.order]

    def linear(self, input: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
        """As `PackedWeight.linear`."""
        if self.joint is not None and input.device.type == "cpu":
            # Streaming weights evicts Python's code from the cache: attributes of modules cost microseconds there.
            weights = [part._buffers[panels.NAME] for part in self._modules.values()]  # type: ignore[union-attr]
            joined: Tensor = _linear_parts(input, weights, self._buffers["places"], bias, *self.joint, activation)
            return joined
        output = torch.cat([part.linear(input, None, activation) for part in self.parts], -1)
        output = output.index_select(-1, self.order)
        return output if bias is None else output + bias.to(output.dtype)

    def conv(self, input: Tensor, bias: Tensor | None, spatial: Spatial) -> Tensor:
        """As `PackedWeight.conv`; grouped convolutions, whose rows see different inputs, use the unpacked weight."""
        if spatial[-1] != 1:
            return reference.convolve(input, self.dequantize(), bias, *spatial)
        output = torch.cat([part.conv(input, None, spatial) for part in self.parts], 1)
        output = output.movedim(1, -1).index_select(-1, self.order)
        return (output if bias is None else output + bias.to(output.dtype)).movedim(-1, 1)

    def lookup(self, indices: Tensor) -> Tensor:
        """As `PackedWeight.lookup`."""
        return lookup_in_parts(self.parts, self.order, indices, self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + ASSIGNMENT] = self.get_buffer(ASSIGNMENT)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super(PackedWeight, self)._load_from_state_dict(state, prefix, *args)
        assert isinstance(self.format, Mix)
        self._arrange_rows(self.format)


def packed_weight(
    packed: Packed, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None, transposed: bool = False
) -> PackedWeight:
    """The weight that holds a packed matrix, of one format or of several; arguments as for `PackedWeight`."""
    kind = MixedWeight if isinstance(packed.format, Mix) else PackedWeight
    return kind(packed, dtype, shape, transposed)
