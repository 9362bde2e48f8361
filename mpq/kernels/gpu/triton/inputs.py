"""Rounding of inputs to 8 bits, in the order in which 8-bit matrix instructions read the weights' fragments."""

import triton
import triton.language as tl


@triton.jit
def _nearest(values):
    """The nearest integer, ties to even, of numbers below 2**22."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _nearest_e4m3(values):
    """The nearest number with three mantissa bits, exponents from -6 on; exact for float8e4nv afterwards."""
    exponent = tl.maximum((tl.abs(values).to(tl.int32, bitcast=True) >> 23) - 127, -6)
    unit = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
    return _nearest(values / unit) * unit


@triton.jit
def round_kernel(
    inputs, scales, out, K, padded_k, input_row, input_col,
    LIMIT: tl.constexpr, LOW: tl.constexpr, HALF: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its scale, absmax / LIMIT as float16 if HALF (never zero), unless all tokens SHARE one; its codes.

    The 16 columns of a tile are written in the order 2 q, 2 q + 1, 2 q + 8, 2 q + 9 for q = 0 to 3.
    """
    row = tl.program_id(0).to(tl.int64)
    at = inputs + row * input_row
    if SHARED:
        scale = tl.load(scales + row)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            col = start + tl.arange(0, BLOCK)
            values = tl.load(at + col * input_col, mask=col < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
        absmax = tl.max(largest, 0)
        scale = absmax / LIMIT
        if HALF:
            scale = tl.maximum(tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32), 2.0**-24)
        scale = tl.where(absmax > 0, scale, 1.0)
        tl.store(scales + row, scale)
    for start in range(0, padded_k, BLOCK):
        place = start + tl.arange(0, BLOCK)
        q = (place % 16) // 4
        col = place // 16 * 16 + 2 * q + place % 2 + 8 * ((place % 4) // 2)
        values = tl.load(at + col * input_col, mask=col < K, other=0.0).to(tl.float32) / scale
        values = tl.minimum(tl.maximum(values, LOW), LIMIT)
        codes = _nearest(values) if out.dtype.element_ty == tl.int8 else _nearest_e4m3(values)
        tl.store(out + row * padded_k + place, codes.to(out.dtype.element_ty), mask=place < padded_k)
