"""The reference of quantizing and dequantizing a matrix; every kernel must equal it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.grids import INTEGER_SCALES, SCALES
from mpq.core.mix import Mix
from mpq.core.pieces import rows_at_once
from mpq.rounding.codes import decode, encode, round_scales, to_float_copy

TABLES = ("scales", "zeros", "tensor_scale", "minima", "super_scales", "super_minima")


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: codes, and tables of scales, zero points and minima.

    Its values are (value of the code - zero point) * scale + minimum. A group's scale is its entry of `scales`, times
    the scale of the tensor or super-block where there is one; minima likewise.
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor  # uint8 (rows, cols); the float copy itself for bf16, fp16 and fp32
    scales: Tensor | None = None  # float32 (rows, groups), or (1, 1) for the tensor; exact in the scale's own type
    zeros: Tensor | None = None  # uint8, as scales
    tensor_scale: Tensor | None = None  # float32 ()
    minima: Tensor | None = None  # float32, as scales; exact in the minimum's own type
    super_scales: Tensor | None = None  # float32 (rows, super-blocks), exact in float16
    super_minima: Tensor | None = None  # the same for minima; usually negative
    parts: tuple["Quantized", ...] = ()  # mixes only: the rows in each used format; `codes` is then empty

    def tables(self) -> dict[str, Tensor]:
        """The tables of the format, by field name; those of a mix's parts by index and field name."""
        if self.parts:
            return {f"{i}_{name}": table for i, part in enumerate(self.parts) for name, table in part.tables().items()}
        return {name: table for name in TABLES if (table := getattr(self, name)) is not None}

    def map_tables(self, change: Callable[[str, Tensor], Tensor]) -> "Quantized":
        """The same codes with `change` applied to every table."""
        if self.parts:
            return replace(self, parts=tuple(_map_part(i, part, change) for i, part in enumerate(self.parts)))
        changed: dict[str, Any] = {name: change(name, table) for name, table in self.tables().items()}
        return replace(self, **changed)

    def part_rows(self) -> list[Tensor]:
        """Of a mix: the rows of each part, int64, on the parts' device."""
        assert isinstance(self.format, Mix)
        places = torch.from_numpy(self.format.assigned(*self.shape)).to(self.parts[0].codes.device)
        return [(places == self.format.formats.index(part.format)).nonzero().flatten() for part in self.parts]


def _map_part(place: int, part: Quantized, change: Callable[[str, Tensor], Tensor]) -> Quantized:
    return part.map_tables(lambda name, table: change(f"{place}_{name}", table))


def quantize(
    weight: Tensor,  # (rows, cols), float
    format: Format,
    *,
    scales: Tensor | None = None,  # (rows, groups), rounded to the scale's type here
    zeros: Tensor | None = None,  # (rows, groups), integers
    tensor_scale: Tensor | None = None,  # ()
) -> Quantized:
    """Round every element to the nearest code, ties to even; by default with scales from the largest magnitude.

    Raises:
        MpqError: the weight is not a matrix of finite numbers, or the format is a mix.
    """
    check_weight(weight)
    if isinstance(format, Mix):
        raise MpqError(f"{format.name} is a mix: expected one format")
    weight = weight.detach()
    if format.is_float_copy:
        return Quantized(format, (weight.shape[0], weight.shape[1]), to_float_copy(weight, format.grid.name))
    weight = weight.float()
    if not format.is_plain:
        return recode(weight, store_tables(*range_tables(weight, format), format, weight))
    if tensor_scale is None:
        tensor_scale = tensor_scale_of(weight, format)
    if scales is None:
        scales, zeros = absmax_scales(weight, format, tensor_scale)
    else:
        scales = storable_scales(scales.float(), format)
    stored_zeros = None if zeros is None else zeros.to(torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return recode(weight, Quantized(format, shape, weight, scales, stored_zeros, tensor_scale))


def check_weight(weight: Tensor) -> None:
    """MpqError when a weight is not a matrix of finite numbers."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise MpqError(
            f"invalid weight: expected a float matrix (rows, cols), not {weight.dtype} {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise MpqError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values and cannot be quantized")


def no_codes(codes: Tensor) -> Tensor:
    """Empty codes (0, cols) in new memory: a slice would keep the whole tensor alive."""
    return codes.new_empty((0, codes.shape[1]))


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Concatenate rows of matrices with one format, tensor scale and number of columns."""
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    whole = replace(first, shape=shape, codes=torch.cat([part.codes for part in parts]))
    tables = [part.tables() for part in parts]
    return whole.map_tables(lambda name, table: table if table.ndim == 0 else torch.cat([one[name] for one in tables]))


def recode(weight: Tensor, tables: Quantized) -> Quantized:  # (rows, cols), float
    """The nearest codes of the weight, ties to even, under the tables of another quantized matrix of its shape."""
    if tables.parts:
        pairs = zip(tables.parts, tables.part_rows(), strict=True)
        return replace(tables, parts=tuple(recode(weight[rows], part) for part, rows in pairs))
    if tables.format.is_float_copy:
        return replace(tables, codes=to_float_copy(weight, tables.format.grid.name))
    format, scales, minima = tables.format, group_scales(tables).unsqueeze(-1), group_minima(tables)
    elements = to_groups(weight.float(), format)
    if minima is not None:
        elements = elements - minima.unsqueeze(-1)
    elements = elements / torch.where(scales == 0, torch.ones_like(scales), scales)
    if tables.zeros is not None:
        elements = elements.round() + tables.zeros.unsqueeze(-1)
    return replace(tables, codes=from_groups(encode(elements, format.grid), format, tables.shape))


def dequantize(quantized: Quantized) -> Tensor:
    """The values of the codes, float32 (rows, cols)."""
    format = quantized.format
    if quantized.parts:
        whole = torch.empty(quantized.shape, device=quantized.codes.device, dtype=torch.float32)
        for part, rows in zip(quantized.parts, quantized.part_rows(), strict=True):
            whole[rows] = dequantize(part)
        return whole
    if format.is_float_copy:
        return quantized.codes.float()
    step = rows_at_once(quantized.shape[1])
    if quantized.shape[0] <= step or format.granularity == "tensor":
        return _numbers(quantized)
    whole = torch.empty(quantized.shape, device=quantized.codes.device, dtype=torch.float32)
    for first in range(0, quantized.shape[0], step):
        some = slice(first, first + step)
        whole[some] = _numbers(_some_rows(quantized, some))
    return whole


def _some_rows(quantized: Quantized, rows: slice) -> Quantized:
    """Neighbouring rows of a matrix in a format whose rows share at most the tensor's scale."""
    codes = quantized.codes[rows]
    some = replace(quantized, shape=(len(codes), quantized.shape[1]), codes=codes)
    return some.map_tables(lambda _, table: table if table.ndim == 0 else table[rows])


def _numbers(quantized: Quantized) -> Tensor:
    format = quantized.format
    elements = to_groups(decode(quantized.codes, format.grid), format)
    if quantized.zeros is not None:
        elements = elements - quantized.zeros.unsqueeze(-1).float()
    elements = elements * group_scales(quantized).unsqueeze(-1)
    minima = group_minima(quantized)
    if minima is not None:
        elements = elements + minima.unsqueeze(-1)
    return from_groups(elements, format, quantized.shape)


def group_scales(quantized: Quantized) -> Tensor:
    """Factors of each group's codes, float32 (rows, groups), or (1, 1) for the tensor."""
    assert quantized.scales is not None
    scales = real_scales(quantized.scales, quantized.tensor_scale)
    return _in_units(scales, quantized.super_scales, quantized.format)


def group_minima(quantized: Quantized) -> Tensor | None:
    """Offsets of each group's values, float32, in the shape of `group_scales`; None in formats without minima."""
    if quantized.minima is None:
        return None
    return _in_units(quantized.minima, quantized.super_minima, quantized.format)


def _in_units(table: Tensor, units: Tensor | None, format: Format) -> Tensor:
    """(rows, groups) times the units of their super-blocks, where there are any."""
    if units is None:
        return table
    return table * units.repeat_interleave(format.super_group, 1)[:, : table.shape[1]]


def real_scales(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Group scales times the tensor's scale."""
    return scales if tensor_scale is None else scales * tensor_scale


def fake_quantize(matrix: Tensor, format: Format) -> Tensor:
    """Quantize and dequantize: float32 (rows, cols)."""
    return dequantize(quantize(matrix, format))


def to_groups(matrix: Tensor, format: Format) -> Tensor:
    """(rows, cols) as (rows or 1, groups, elements that share a scale); a short last group is filled with zeros."""
    rows, cols = matrix.shape
    if format.granularity == "tensor":
        return matrix.reshape(1, 1, rows * cols)
    if format.granularity == "channel":
        return matrix.unsqueeze(1)
    missing = -cols % format.group_size
    return functional.pad(matrix, (0, missing)).reshape(rows, format.groups(cols), format.group_size)


def from_groups(elements: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_groups`."""
    if format.granularity == "group":
        return elements.flatten(1)[:, : shape[1]].contiguous()
    return elements.reshape(shape)


def tensor_scale_of(weight: Tensor, format: Format) -> Tensor | None:
    """NVFP4's tensor scale, () or None: the least power of two at which no group scale overflows.

    A power of two, where NVIDIA's recipe takes absmax / (largest scale * largest element) itself: layers that a server
    computes as one, with one tensor scale, can then share the largest without a change of their numbers.
    """
    if not format.tensor_scale:
        return None
    largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
    mantissa, exponent = torch.frexp(largest / (SCALES[format.scale].max * format.grid.max))
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return torch.where(mantissa > 0, scale, torch.ones_like(scale))


def absmax_scales(weight: Tensor, format: Format, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales, rounded to their type, that map each group's largest magnitude to the grid's end; zero points or None.

    Power-of-two scales follow the MX specification, section 6.3: 2**(floor(log2(absmax)) - floor(log2(grid.max))).
    With zero points the range always includes zero, which is exact.
    """
    elements = to_groups(weight, format)
    if format.zero_point:
        if elements.shape[-1] == 0:
            empty = elements.new_ones(elements.shape[:-1])
            return empty, torch.zeros_like(empty)
        low = elements.amin(-1).clamp(max=0)
        scales = round_scales((elements.amax(-1).clamp(min=0) - low) / format.grid.max, format.scale)
        return scales, (-low / scales).round().clamp(0, format.grid.max)
    absmax = elements.abs().amax(-1) if elements.shape[-1] else elements.new_zeros(elements.shape[:-1])
    if tensor_scale is not None:
        absmax = absmax / tensor_scale
    if format.scale == "e8m0":
        exponent = torch.frexp(absmax).exponent - 1 - format.grid.max_exponent
        scales = torch.ldexp(torch.ones_like(absmax), exponent.clamp(-126, 127))
        return torch.where(absmax > 0, scales, torch.ones_like(scales)), None
    return storable_scales(absmax / format.grid.max, format), None


def range_tables(weight: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Unrounded scales and minima that map each group's range to the grid's; for formats that are not plain.

    Minima of super-blocks are at most zero, since their units have one sign.
    """
    if not format.minimum:
        return to_groups(weight, format).abs().amax(-1) / format.grid.max, None
    low, high = group_range(weight, format)
    return (high - low) / format.grid.max, low


def group_range(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, (rows, groups); in super-blocks the range includes zero."""
    elements = to_groups(weight, format)
    if elements.shape[-1] == 0:
        return elements.new_zeros(elements.shape[:-1]), elements.new_zeros(elements.shape[:-1])
    filling = to_groups(torch.ones_like(weight), format) == 0  # padding of a short last group
    low = torch.where(filling, torch.inf, elements).amin(-1)
    high = torch.where(filling, -torch.inf, elements).amax(-1)
    return (low.clamp(max=0), high.clamp(min=0)) if format.super_group else (low, high)


def store_tables(scales: Tensor, minima: Tensor | None, format: Format, weight: Tensor) -> Quantized:
    """Scales and minima (rows, groups) rounded to the format's types, as a Quantized without codes."""
    shape = (weight.shape[0], weight.shape[1])
    if format.super_group:
        scales, super_scales = round_in_units(scales, format.scale, format.super_group)
        super_minima = None
        if minima is not None:
            minima, super_minima = round_in_units(minima, format.minimum, format.super_group)
        return Quantized(format, shape, weight, scales, None, None, minima, super_scales, super_minima)
    minima = None if minima is None else round_minima(minima, format)
    return Quantized(format, shape, weight, storable_scales(scales, format), minima=minima)


def round_in_units(
    table: Tensor,  # (rows, groups)
    kind: str,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The integers (rows, groups), and a float16 unit for each `size` neighbours, nearest to a table.

    The entry of largest magnitude becomes the type's integer of largest magnitude.
    """
    grid = INTEGER_SCALES[kind]
    rows, groups = table.shape
    blocks = functional.pad(table, (0, -groups % size)).reshape(rows, -(-groups // size), size)
    extreme = torch.gather(blocks, -1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    units = round_scales(extreme / (grid.min if grid.signed else grid.max), "fp16")
    integers = (blocks / units.unsqueeze(-1)).round().clamp(grid.min, grid.max)
    return integers.flatten(1)[:, :groups].contiguous(), units


def storable_scales(scales: Tensor, format: Format) -> Tensor:
    """Scales rounded to the format's type; zero only for all-zero groups of grids without a zero."""
    rounded = round_scales(scales, format.scale)
    if format.grid.has_zero:
        return rounded
    return torch.where(scales == 0, torch.zeros_like(rounded), rounded)


def round_minima(minima: Tensor, format: Format) -> Tensor:
    """Minima rounded to the format's float type, float32."""
    return to_float_copy(minima, format.minimum).float()
