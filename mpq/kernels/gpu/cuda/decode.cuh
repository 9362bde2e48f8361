// Four-bit codes of the layout "fragments" to 16-bit floats, exactly, by exponent insertion.

#if BF16
constexpr u32 MAGIC = 0x43004300;  // two halves of 128: the last place is one
constexpr u32 ONE = 0x3f803f80;
#else
constexpr u32 MAGIC = 0x64006400;  // two halves of 1024
constexpr u32 ONE = 0x3c003c00, SIXTEENTH = 0x2c002c00;
#endif

// What to add for the codes of rows g (even registers) and g + 8 (odd ones), in both halves.
struct Offsets { u32 even, odd; };

__device__ __forceinline__ u32 both(u16 bits) { return bits * 0x10001u; }

__device__ __forceinline__ Offsets offsets(int zero_even, int zero_odd) {
#if BF16
    return {both(from_float(-128.f - zero_even)), both(from_float(-128.f - zero_odd))};
#else
    return {both(from_float(-1024.f - zero_even)), both(from_float(-64.f - zero_odd))};
#endif
}

// Eight codes as the left fragment of a 16x16 tile.
__device__ __forceinline__ void decode(u32 (&left)[4], u32 codes, const Offsets &offset) {
#if BF16
    left[0] = fused((codes & 0x000f000f) | MAGIC, ONE, offset.even);
    left[1] = fused(((codes >> 4) & 0x000f000f) | MAGIC, ONE, offset.odd);
    left[2] = fused(((codes >> 8) & 0x000f000f) | MAGIC, ONE, offset.even);
    left[3] = fused(((codes >> 12) & 0x000f000f) | MAGIC, ONE, offset.odd);
#else
    left[0] = fused((codes & 0x000f000f) | MAGIC, ONE, offset.even);
    left[1] = fused((codes & 0x00f000f0) | MAGIC, SIXTEENTH, offset.odd);  // 1024 + 16 code, over 16
    codes >>= 8;
    left[2] = fused((codes & 0x000f000f) | MAGIC, ONE, offset.even);
    left[3] = fused((codes & 0x00f000f0) | MAGIC, SIXTEENTH, offset.odd);
#endif
}
