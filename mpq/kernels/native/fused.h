/* One token: codes are decoded in registers and multiplied at once. */

/* The four steps of a quad as levels, those of TABLE16 still codes; a block's are 2**shift_of times as large. */
INLINE void levels256(const int bits, const int kind, const uint8_t *codes, const __m512i table[4], __m512i spread,
                      __m512i shifts, __m512i out[4]) {
  if (kind == MPQ_INTEGER && bits < 8 && 8 % bits == 0) {
    const int each = 8 / bits; /* steps in 64 bytes: masked, not shifted */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      out[i] = _mm512_and_si512(LOAD(__m512i, codes + i / each * 64),
                                _mm512_set1_epi8((char)(((1 << bits) - 1) << i % each * bits)));
  } else if (kind != MPQ_INTEGER && bits == 4) { /* tables repeat: what stands above a code does not matter */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += 2) {
      __m512i both = LOAD(__m512i, codes + 32 * i);
      out[i] = both, out[i + 1] = _mm512_srli_epi16(both, 4);
    }
  } else {
    codes256(bits, codes, spread, shifts, out);
  }
  if (kind == MPQ_TABLE8)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = _mm512_permutexvar_epi8(out[i], table[0]);
}

INLINE int shift_of(const int bits, const int kind, int block) {
  return kind == MPQ_INTEGER && bits < 8 && 8 % bits == 0 ? block % (8 / bits) * bits : 0;
}

/* _mm512_dpbusd_epi32, for which GCC copies the sums to another register and back at every turn of a loop. */
INLINE void add_dots(__m512i *sums, __m512i levels, __m512i columns) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(levels), "v"(columns));
}

/* A segment's 64 scales, but for a power of two that is returned. */
INLINE float scales64(int kind, const uint8_t *scales, __m512 out[4]) {
  if (kind == MPQ_E4M3 || kind == MPQ_UE5M3) { /* float16 with another bias, or without a sign */
    for (int half = 0; half < 2; half++) {
      __m512i code = _mm512_cvtepu8_epi16(LOAD(__m256i, scales + 32 * half));
      if (kind == MPQ_UE5M3) code = _mm512_slli_epi16(code, 7);
      else code = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(code, 8), 1), _mm512_set1_epi16((short)0xbf80));
      out[2 * half] = _mm512_cvtph_ps(_mm512_castsi512_si256(code));
      out[2 * half + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(code, 1));
    }
    return kind == MPQ_E4M3 ? 256 : 1;
  }
  for (int block = 0; block < 4; block++) {
    const int index = 16 * block;
    if (kind == MPQ_FP16) out[block] = scales16(MPQ_FP16, scales, index);
    else if (kind == MPQ_E8M0) out[block] = scales16(MPQ_E8M0, scales, index);
    else if (kind == MPQ_BF16) out[block] = scales16(MPQ_BF16, scales, index);
    else out[block] = scales16(MPQ_FP32, scales, index);
  }
  return 1;
}

/* sums (64,) += the part of a tile. Sums of a segment are whole numbers below 2**31, also when they are 2**shift_of
 * times as large; on the way they may wrap. Loops are unrolled so that GCC keeps what they index in registers. */
INLINE void fused_bytes(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                        const int kind, const int planes, float *sums) {
  const int width = weight->segment * weight->segments, two = kind == MPQ_TABLE16;
  const uint8_t *codes = tile->levels[0], *scales = tile->scales, *zeros = tile->zeros;
  const int8_t *q = x->q + tile->index * planes * width;
  const int32_t *sum = x->sums + tile->index * weight->segments * planes;
  const __m512i table[4] = {LOAD(__m512i, weight->low), LOAD(__m512i, weight->high)};
  const float factor = x->scale[tile->index] * weight->factor;
  uint8_t spread[64], shift[64];
  for (int i = 0; i < 64; i++) spread[i] = i / 8 * bits + i % 8, shift[i] = i % 8 * bits;
  const __m512i spreads = LOAD(__m512i, spread), shifts = LOAD(__m512i, shift);
  __m512 all[4];
#pragma GCC unroll 4
  for (int block = 0; block < 4; block++) all[block] = LOAD(__m512, sums + 16 * block);
  for (int segment = 0; segment < weight->segments; segment++, q += weight->segment, sum += planes) {
    const int32_t total = planes == 2 ? 256 * sum[0] + sum[1] : sum[0];
    __m512i dots[2][2][4];
#pragma GCC unroll 2
    for (int l = 0; l <= two; l++)
#pragma GCC unroll 4
      for (int block = 0; block < 4; block++) {
        const uint32_t start = -(uint32_t)((two ? 128 * !l : weight->offset) * total);
        dots[l][0][block] = _mm512_setzero_si512();
        dots[l][planes - 1][block] = _mm512_set1_epi32((int32_t)(start << shift_of(bits, kind, block)));
      }
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 32 * bits) {
      __m512i level[4];
      for (int line = 0; line < 32 * bits; line += 64)
        _mm_prefetch((const char *)codes + MPQ_AHEAD + line, _MM_HINT_T1);
      levels256(bits, kind, codes, table, spreads, shifts, level);
#pragma GCC unroll 2
      for (int l = 0; l <= two; l++)
#pragma GCC unroll 2
        for (int p = 0; p < planes; p++) {
          const __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + p * width + 4 * quad));
#pragma GCC unroll 4
          for (int block = 0; block < 4; block++) {
            __m512i found = level[block];
            if (two) found = _mm512_permutexvar_epi8(found, table[!l]);
            add_dots(&dots[l][p][block], found, columns);
          }
        }
    }
    __m512 scale[4];
    const float unit = factor * scales64(weight->scale_kind, scales, scale);
#pragma GCC unroll 4
    for (int block = 0; block < 4; block++) {
      const float times = 1 << shift_of(bits, kind, block);
      __m512 found = _mm512_setzero_ps();
#pragma GCC unroll 2
      for (int l = 0; l <= two; l++) {
        __m512i whole = dots[l][0][block];
        if (planes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), dots[l][1][block]);
        found = l ? _mm512_fmadd_ps(found, _mm512_set1_ps(256), _mm512_cvtepi32_ps(whole)) : _mm512_cvtepi32_ps(whole);
      }
      if (zeros) {
        const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, zeros + 16 * block)));
        found = _mm512_fnmadd_ps(zero, _mm512_set1_ps((float)total * times), found);
      }
      all[block] = _mm512_fmadd_ps(found, _mm512_mul_ps(scale[block], _mm512_set1_ps(unit / times)), all[block]);
    }
    if (weight->row_scales) continue;
    scales += MPQ_ROWS * weight->scale_bytes;
    if (zeros) zeros += MPQ_ROWS;
  }
#pragma GCC unroll 4
  for (int block = 0; block < 4; block++) STORE(sums + 16 * block, all[block]);
}

#define FUSED(bits) \
  case bits: \
    if (kind == MPQ_INTEGER && planes == 2) fused_bytes(weight, tile, x, bits, MPQ_INTEGER, 2, sums); \
    else if (kind == MPQ_INTEGER) fused_bytes(weight, tile, x, bits, MPQ_INTEGER, 1, sums); \
    else if (kind == MPQ_TABLE8 && planes == 2) fused_bytes(weight, tile, x, bits, MPQ_TABLE8, 2, sums); \
    else if (kind == MPQ_TABLE8) fused_bytes(weight, tile, x, bits, MPQ_TABLE8, 1, sums); \
    else if (planes == 2) fused_bytes(weight, tile, x, bits, MPQ_TABLE16, 2, sums); \
    else fused_bytes(weight, tile, x, bits, MPQ_TABLE16, 1, sums); \
    break;

INLINE void fused(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, float *sums) {
  const int kind = weight->kind, planes = x->planes;
  switch (weight->bits) { FUSED(2) FUSED(3) FUSED(4) FUSED(5) FUSED(6) FUSED(7) FUSED(8) }
}
