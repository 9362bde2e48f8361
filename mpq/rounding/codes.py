"""Codes of single numbers: nearest in a grid and back, 16- and 32-bit copies, and the stored types of scales."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from mpq.core.grids import SCALES, Grid

COPY_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXPONENT_BITS, FLOAT32_MANTISSA = 0x7F800000, 23
SCALE_DTYPES = {**COPY_DTYPES, **dict.fromkeys(SCALES.keys() - COPY_DTYPES.keys(), torch.uint8)}


def round_scales(scales: Tensor, kind: str) -> Tensor:
    """Scales rounded to their type, float32; never zero, infinite or NaN: zero becomes 1, an underflow the smallest
    positive scale. Signed types keep the sign.
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
    # In units of the last place; rounding up to the next power of two carries into the exponent field below.
    units = torch.ldexp(magnitude, grid.mantissa - exponent).round().int()
    code = units + ((exponent - lowest) << grid.mantissa)
    sign = (values < 0) & (code > 0) if grid.signed else torch.zeros_like(values, dtype=torch.bool)
    return (code + (sign.int() << (grid.exponent + grid.mantissa))).to(torch.uint8)


def encode_by_search(values: Tensor, grid: Grid) -> Tensor:
    """`encode` by comparison with every value of the grid: slow and simple, for tests."""
    table = torch.tensor(grid.values(), dtype=torch.float64)
    distance = (values.double().unsqueeze(-1) - table).abs().nan_to_num(nan=math.inf)
    nearest = distance == distance.amin(-1, keepdim=True)
    preference = torch.arange(len(table)) % (len(table) if grid.family == "codebook" else 2)
    return torch.where(nearest, preference, len(table)).argmin(-1).to(torch.uint8)


def snap(values: Tensor, grid: Grid) -> Tensor:
    """`decode(encode(values, grid), grid)` of finite values, several times faster: float32, same shape."""
    if grid.family == "int":
        return values.float().round().clamp(grid.min, grid.max)
    if grid.family != "float":
        return decode(encode(values, grid), grid)
    inside = values.float().clamp(grid.min, grid.max)
    # Adding a number so large that float32 has no finer digit than the grid's last one rounds to the grid, ties to
    # even.
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
    """The weight as a 16- or 32-bit float; values beyond its range become its largest."""
    dtype = COPY_DTYPES[name]
    limit = torch.finfo(dtype).max
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide.clamp(-limit, limit).to(dtype)


def encode_scales(scales: Tensor, kind: str) -> Tensor:
    """Scales in their stored form: a float tensor, or codes of a smaller type as uint8. Exact."""
    if kind in COPY_DTYPES:
        return scales.to(COPY_DTYPES[kind])
    return encode(scales, SCALES[kind])


def decode_scales(stored: Tensor, kind: str) -> Tensor:
    """The inverse of `encode_scales`, float32."""
    return stored.float() if kind in COPY_DTYPES else decode(stored, SCALES[kind])
