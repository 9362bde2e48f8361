"""Quantize and dequantize a matrix in a format: the plain reference that every kernel must equal."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.grids import SCALES, Grid

COPY_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXPONENT_BITS, FLOAT32_MANTISSA = 0x7F800000, 23
SCALE_DTYPES = {**COPY_DTYPES, "e8m0": torch.uint8, "e4m3": torch.uint8, "ue5m3": torch.uint8}


@dataclass(frozen=True)
class Quantized:
    """A matrix in a format. Its numbers are (value of the code - zero point) * (scale * tensor scale)."""

    format: Format
    shape: tuple[int, int]
    codes: Tensor  # uint8 (rows, cols); the float copy itself for bf16, fp16 and fp32
    scales: Tensor | None = None  # float32 (rows, groups), or (1, 1) for the tensor; exact in the scale's own type
    zeros: Tensor | None = None  # uint8, as scales
    tensor_scale: Tensor | None = None  # float32 ()


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
        MpqError: the weight is not a matrix of finite numbers.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise MpqError(f"quantize wants a float matrix (rows, cols), not {weight.dtype} {tuple(weight.shape)}")
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise MpqError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinite numbers and cannot be quantized")
    shape = (weight.shape[0], weight.shape[1])
    if format.is_float_copy:
        return Quantized(format, shape, to_float_copy(weight, format.grid.name))
    weight = weight.float()
    if tensor_scale is None:
        tensor_scale = tensor_scale_of(weight, format)
    if scales is None:
        scales, zeros = absmax_scales(weight, format, tensor_scale)
    else:
        scales = round_scales(scales.float(), format.scale)
    elements = spread(weight, format) / real_scales(scales, tensor_scale).unsqueeze(-1)
    if zeros is not None:
        elements = elements.round() + zeros.unsqueeze(-1)
    codes = gather(encode(elements, format.grid), format, shape)
    stored_zeros = None if zeros is None else zeros.to(torch.uint8)
    return Quantized(format, shape, codes, scales, stored_zeros, tensor_scale)


def dequantize(quantized: Quantized) -> Tensor:
    """The numbers that the codes stand for, float32 (rows, cols)."""
    format = quantized.format
    if format.is_float_copy:
        return quantized.codes.float()
    assert quantized.scales is not None
    elements = spread(decode(quantized.codes, format.grid), format)
    if quantized.zeros is not None:
        elements = elements - quantized.zeros.unsqueeze(-1).float()
    elements = elements * real_scales(quantized.scales, quantized.tensor_scale).unsqueeze(-1)
    return gather(elements, format, quantized.shape)


def fake_quantize(matrix: Tensor, format: Format) -> Tensor:
    """Quantize and dequantize at once: float32 (rows, cols)."""
    return dequantize(quantize(matrix, format))


def spread(matrix: Tensor, format: Format) -> Tensor:
    """(rows, cols) as (rows or 1, groups, elements that share a scale); a short last group is filled with zeros."""
    rows, cols = matrix.shape
    if format.granularity == "tensor":
        return matrix.reshape(1, 1, rows * cols)
    if format.granularity == "channel":
        return matrix.unsqueeze(1)
    missing = -cols % format.group_size
    return functional.pad(matrix, (0, missing)).reshape(rows, format.groups(cols), format.group_size)


def gather(elements: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
    """The inverse of `spread`."""
    if format.granularity == "group":
        return elements.flatten(1)[:, : shape[1]].contiguous()
    return elements.reshape(shape)


def real_scales(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Group scales times the tensor's own."""
    return scales if tensor_scale is None else scales * tensor_scale


def tensor_scale_of(weight: Tensor, format: Format) -> Tensor | None:
    """NVFP4's second level, () or None: absmax / (largest scale * largest element); no group scale overflows."""
    if not format.tensor_scale:
        return None
    largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
    scale = largest / (SCALES[format.scale].max * format.grid.max)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def absmax_scales(weight: Tensor, format: Format, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales, rounded to their type, that map each group's largest magnitude to the grid's end; zero points if any.

    Power-of-two scales follow the MX specification, section 6.3: 2**(floor(log2(absmax)) - floor(log2(grid.max))).
    With zero points the range always holds zero, and zero is exact.
    """
    elements = spread(weight, format)
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
    return round_scales(absmax / format.grid.max, format.scale), None


def round_scales(scales: Tensor, kind: str) -> Tensor:
    """Nearest scale that its type can hold, float32; never zero, infinite or NaN: zero becomes 1, an underflow the
    smallest positive scale. Signs survive in types that have one.
    """
    grid = SCALES[kind]
    magnitude = scales.abs()
    if kind in COPY_DTYPES:
        rounded = magnitude.clamp(max=grid.max).to(COPY_DTYPES[kind]).float()
    elif kind == "e8m0":
        rounded = torch.ldexp(torch.ones_like(magnitude), torch.log2(magnitude).round().clamp(-126, 127).int())
    else:
        rounded = decode(encode(magnitude, grid), grid)
    rounded = rounded.clamp(min=grid.smallest)
    if grid.signed:
        rounded = torch.copysign(rounded, scales)
    return torch.where(magnitude > 0, rounded, torch.ones_like(rounded))


def encode(values: Tensor, grid: Grid) -> Tensor:
    """Nearest code of each value, saturating: uint8, same shape. Ties: the even code, or a codebook's lower."""
    if grid.family == "int":
        return (values.round().clamp(grid.min, grid.max) + grid.offset).to(torch.uint8)
    if grid.family == "codebook":
        table = torch.tensor(grid.values(), device=values.device)
        return torch.bucketize(values.double(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
    if grid.family == "exponent":
        return (torch.log2(values).round() + grid.bias).clamp(0, 254).to(torch.uint8)
    return _encode_float(values, grid)


def _encode_float(values: Tensor, grid: Grid) -> Tensor:
    magnitude = values.abs().clamp(max=grid.max)
    lowest = 1 - grid.bias  # exponent of the smallest normal number, and of all subnormals
    exponent = torch.where(magnitude > 0, torch.frexp(magnitude).exponent - 1, lowest).clamp(min=lowest)
    # In units of the last place; rounding up to the next power of two simply carries into the exponent field below.
    units = torch.ldexp(magnitude, grid.mantissa - exponent).round().int()
    code = units + ((exponent - lowest) << grid.mantissa)
    sign = (values < 0) & (code > 0) if grid.signed else torch.zeros_like(values, dtype=torch.bool)
    return (code + (sign.int() << (grid.exponent + grid.mantissa))).to(torch.uint8)


def encode_by_search(values: Tensor, grid: Grid) -> Tensor:
    """`encode` by comparing with every value of the grid: slow, and obviously right."""
    table = torch.tensor(grid.values(), dtype=torch.float64)
    distance = (values.double().unsqueeze(-1) - table).abs().nan_to_num(nan=math.inf)
    nearest = distance == distance.amin(-1, keepdim=True)
    preference = torch.arange(len(table)) % (len(table) if grid.family == "codebook" else 2)
    return torch.where(nearest, preference, len(table)).argmin(-1).to(torch.uint8)


def snap(values: Tensor, grid: Grid) -> Tensor:
    """`decode(encode(values, grid), grid)` of finite numbers, several times faster: float32, same shape."""
    if grid.family == "int":
        return values.float().round().clamp(grid.min, grid.max)
    if grid.family != "float":
        return decode(encode(values, grid), grid)
    inside = values.float().clamp(grid.min, grid.max)
    # The power of two below each value, and a number so much larger that adding it leaves float32 no finer digit than
    # the grid's last one: its own rounding, ties to even, does the work.
    power = (inside.view(torch.int32) & EXPONENT_BITS).view(torch.float32).clamp(min=2.0 ** (1 - grid.bias))
    large = power * (1.5 * 2.0 ** (FLOAT32_MANTISSA - grid.mantissa))
    return inside + large - large


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Value of each code, float32, same shape."""
    return decode_table(grid, codes.device)[codes.int()]


@lru_cache(maxsize=64)
def decode_table(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Value of every code, float32 (2**bits,); NaN where a code is not a finite number."""
    return torch.tensor(grid.values(), dtype=torch.float32, device=device)


def to_float_copy(weight: Tensor, name: str) -> Tensor:
    """The weight in a 16- or 32-bit float; numbers beyond its range become its largest."""
    dtype = COPY_DTYPES[name]
    limit = torch.finfo(dtype).max
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide.clamp(-limit, limit).to(dtype)


def encode_scales(scales: Tensor, kind: str) -> Tensor:
    """Scales as they are stored: a float tensor, or the bit patterns of an 8-bit type as uint8. Exact."""
    if kind in COPY_DTYPES:
        return scales.to(COPY_DTYPES[kind])
    return encode(scales, SCALES[kind])


def decode_scales(stored: Tensor, kind: str) -> Tensor:
    """The inverse of `encode_scales`, float32."""
    return stored.float() if kind in COPY_DTYPES else decode(stored, SCALES[kind])
