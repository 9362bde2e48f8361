"""Device functions: from containers of the layout "fragments" to numbers, by bit tricks driven by the format's data.

`KIND` says what a code is: "int" (code - zero point), "float" (sign, exponent, mantissa) or "table" (a codebook).
Integers become floats by exponent insertion: the code in the mantissa of a number whose last place is one (1024 in
float16, 128 in bfloat16, 2**23 in float32), less that number and the zero point; both steps are exact. Small floats are
put in place in a wider float, subnormals included, and scaled by the difference of the exponents' biases, exactly.

`EMULATE` is for Triton's interpreter, which has no bfloat16 arithmetic: the same exact steps, in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _pair(four, two, one, INDEX: tl.constexpr, BITS: tl.constexpr, MAGIC: tl.constexpr):
    """Codes INDEX and INDEX + 4 of each container with MAGIC inserted: int16 with a new last axis of the two."""
    pair = tl.full(four.shape, MAGIC, tl.int32)
    if BITS & 4:
        pair |= ((four >> (4 * INDEX)) & 0x000F000F) << (BITS & 3)
    if BITS & 2:
        pair |= ((two >> (2 * INDEX)) & 0x00030003) << (BITS & 1)
    if BITS & 1:
        pair |= (one >> INDEX) & 0x00010001
    return tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))


@triton.jit
def _bytes(eight, place, mask, MASKED: tl.constexpr):
    at = place[:, :, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    if MASKED:
        codes = tl.load(eight + at, mask=mask[:, :, :, None], other=0)
    else:
        codes = tl.load(eight + at)
    return codes


@triton.jit
def _containers(field, place, mask, MASKED: tl.constexpr):
    if MASKED:
        words = tl.load(field + place, mask=mask, other=0)
    else:
        words = tl.load(field + place)
    return words.to(tl.int32)


@triton.jit
def load_codes(
    first,
    second,
    third,
    place,
    mask,
    BITS: tl.constexpr,
    MAGIC: tl.constexpr,
    MASKED: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Codes of the tiles at `place` (row tiles, 32 lanes, column tiles) as a matrix, int16 with MAGIC inserted.

    `first` to `third` are the format's fields, widest first. With BYTES, the 16 columns of each tile come in the order
    2 q, 2 q + 1, 2 q + 8, 2 q + 9 for q = 0 to 3: what a lane holds lies together, for 8-bit instructions.
    """
    TILES: tl.constexpr = place.shape[0]
    COLS: tl.constexpr = place.shape[2]
    if BITS == 8:
        flat = _bytes(first, place, mask, MASKED).to(tl.int16) | tl.full((1, 1, 1, 1), MAGIC & 0xFFFF, tl.int16)
        split = tl.reshape(flat, (TILES, 8, 4, COLS, 2, 2, 2))  # low bit, column >= 8, row >= 8
        codes = tl.permute(split, (0, 1, 2, 3, 4, 6, 5))
    else:
        four = tl.zeros(place.shape, tl.int32)
        two = four
        one = four
        if BITS & 4:
            four = _containers(first, place, mask, MASKED)
        if BITS & 2:
            two = _containers(second if BITS & 4 else first, place, mask, MASKED)
            two = (two & 0xFF) | ((two & 0xFF00) << 8)  # codes 4 to 7 into the upper half
        if BITS & 1:
            if BITS == 7:
                one = _containers(third, place, mask, MASKED)
            else:
                one = _containers(second if BITS > 1 else first, place, mask, MASKED)
            one = (one & 0xF) | ((one & 0xF0) << 12)
        left = tl.join(_pair(four, two, one, 0, BITS, MAGIC), _pair(four, two, one, 1, BITS, MAGIC))
        right = tl.join(_pair(four, two, one, 2, BITS, MAGIC), _pair(four, two, one, 3, BITS, MAGIC))
        codes = tl.reshape(tl.join(left, right), (TILES, 8, 4, COLS, 2, 2, 2))  # low bit, row >= 8, column >= 8
    if BYTES:
        matrix = tl.permute(codes, (0, 5, 1, 3, 2, 6, 4))
    else:
        matrix = tl.permute(codes, (0, 5, 1, 3, 6, 2, 4))
    return tl.reshape(matrix, (TILES * 16, COLS * 16))


@triton.jit
def small_float(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SIGNED: tl.constexpr):
    """The floats that the codes (int32) stand for, float32."""
    FIELD: tl.constexpr = EXPONENT + MANTISSA
    bits = (codes & ((1 << FIELD) - 1)) << (23 - MANTISSA)
    if SIGNED:
        bits |= (codes >> FIELD) << 31
    return bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def to_numbers(codes, zeros, table, SPEC: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """The codes' values (int16, with the spec's magic) before scaling, in DTYPE; exact except for codebooks.

    `zeros` (int16, broadcast against the codes) are what the code of zero is.
    """
    if tl.float8e4nv == DTYPE:
        numbers = codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif SPEC.kind == "table":
        numbers = tl.load(table + codes.to(tl.int32)).to(DTYPE)
    elif SPEC.kind == "float":
        if tl.float16 == DTYPE and SPEC.fits_fp16:
            FIELD: tl.constexpr = SPEC.exponent + SPEC.mantissa
            bits = ((codes & ((1 << FIELD) - 1)) << (10 - SPEC.mantissa)) | ((codes >> FIELD) << 15)
            rebias = tl.full((1, 1), 2.0 ** (15 - SPEC.bias), tl.float16)
            numbers = bits.to(tl.int16).to(tl.float16, bitcast=True) * rebias
        else:
            wide = small_float(codes.to(tl.int32), SPEC.exponent, SPEC.mantissa, SPEC.bias, SPEC.signed)
            numbers = wide.to(DTYPE)
    elif tl.int8 == DTYPE:
        numbers = (codes - zeros).to(tl.int8)
    elif tl.float16 == DTYPE:
        numbers = codes.to(tl.float16, bitcast=True) - (zeros + 1024).to(tl.float16)
    elif SPEC.bits == 8:
        numbers = (codes - zeros).to(tl.float32).to(DTYPE)
    elif EMULATE:
        numbers = (codes.to(tl.bfloat16, bitcast=True).to(tl.float32) - (zeros + 128).to(tl.float32)).to(DTYPE)
    else:
        numbers = codes.to(tl.bfloat16, bitcast=True) - (zeros + 128).to(tl.bfloat16)
    return numbers


@triton.jit
def load_scales(scale, at, mask, SPEC: tl.constexpr):
    """Scales from their stored type, float32."""
    stored = tl.load(scale + at, mask=mask, other=0)
    if SPEC.scale == "e8m0":
        exponent = stored.to(tl.int32) << 23
        scales = tl.maximum(exponent, 1 << 22).to(tl.float32, bitcast=True)  # code 0 is 2**-127, a subnormal
    elif SPEC.scale == "e4m3":
        scales = small_float(stored.to(tl.int32), 4, 3, 7, True)
    elif SPEC.scale == "ue5m3":
        scales = small_float(stored.to(tl.int32), 5, 3, 15, False)
    else:
        scales = stored.to(tl.float32)
    return scales
