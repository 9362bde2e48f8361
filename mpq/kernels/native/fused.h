/* One token: codes are decoded in registers and multiplied at once. */

/* The four steps of a quad as levels, those of TABLE16 still codes; a block's are 2**shift_of times as large. */
INLINE void levels256(const int bits, const int kind, const uint8_t *codes, const __m512i table[4], __m512i spread,
                      __m512i shifts, __m512i out[4]) {
  if (kind == MPQ_INTEGER && bits < 8 && 8 % bits == 0) {
    const int each = 8 / bits; /* steps in 64 bytes: masked, not shifted */
    for (int i = 0; i < 4; i++)
      out[i] = _mm512_and_si512(LOAD(__m512i, codes + i / each * 64),
                                _mm512_set1_epi8((char)(((1 << bits) - 1) << i % each * bits)));
  } else if (kind != MPQ_INTEGER && bits == 4) { /* tables repeat: what stands above a code does not matter */
    for (int i = 0; i < 4; i += 2) {
      __m512i both = LOAD(__m512i, codes + 32 * i);
      out[i] = both, out[i + 1] = _mm512_srli_epi16(both, 4);
    }
  } else {
    codes256(bits, codes, spread, shifts, out);
  }
  if (kind == MPQ_TABLE8)
    for (int i = 0; i < 4; i++) out[i] = _mm512_permutexvar_epi8(out[i], table[0]);
}

INLINE int shift_of(const int bits, const int kind, int block) {
  return kind == MPQ_INTEGER && bits < 8 && 8 % bits == 0 ? block % (8 / bits) * bits : 0;
}

INLINE void fused_bytes(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                        const int kind, const int planes, float *sums) {
  const int width = weight->segment * weight->segments, two = kind == MPQ_TABLE16;
  const uint8_t *codes = tile->levels[0];
  const int8_t *q = x->q + tile->index * planes * width;
  const __m512i table[4] = {LOAD(__m512i, weight->low), LOAD(__m512i, weight->high)};
  uint8_t spread[64], shift[64];
  for (int i = 0; i < 64; i++) spread[i] = i / 8 * bits + i % 8, shift[i] = i % 8 * bits;
  const __m512i spreads = LOAD(__m512i, spread), shifts = LOAD(__m512i, shift);
  const __m512 factor = _mm512_set1_ps(x->scale[tile->index] * weight->factor);
  for (int segment = 0; segment < weight->segments; segment++, q += weight->segment) {
    const int32_t *sum = x->sums + (tile->index * weight->segments + segment) * planes;
    const int32_t total = planes == 2 ? 256 * sum[0] + sum[1] : sum[0];
    __m512i dots[2][2][4];
    for (int i = 0; i < 16; i++) dots[i / 8][i / 4 % 2][i % 4] = _mm512_setzero_si512();
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 32 * bits) {
      __m512i level[4];
      for (int line = 0; line < 32 * bits; line += 64)
        _mm_prefetch((const char *)codes + MPQ_AHEAD + line, _MM_HINT_T0);
      levels256(bits, kind, codes, table, spreads, shifts, level);
      for (int l = 0; l <= two; l++)
        for (int p = 0; p < planes; p++) {
          const __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + p * width + 4 * quad));
          for (int block = 0; block < 4; block++) {
            __m512i found = level[block];
            if (two) found = _mm512_permutexvar_epi8(found, table[!l]);
            dots[l][p][block] = _mm512_dpbusd_epi32(dots[l][p][block], found, columns);
          }
        }
    }
    for (int block = 0; block < 4; block++) {
      const int index = MPQ_ROWS * (weight->row_scales ? 0 : segment) + 16 * block;
      __m512 found = _mm512_setzero_ps();
      for (int l = 0; l <= two; l++) { /* sums of whole numbers below 2**31, whose cut bits are zeros */
        const int offset = two ? 128 * !l : weight->offset;
        __m512i whole = _mm512_srai_epi32(dots[l][0][block], shift_of(bits, kind, block));
        if (planes == 2)
          whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8),
                                   _mm512_srai_epi32(dots[l][1][block], shift_of(bits, kind, block)));
        whole = _mm512_sub_epi32(whole, _mm512_set1_epi32(offset * total));
        found = _mm512_fmadd_ps(found, _mm512_set1_ps(256), _mm512_cvtepi32_ps(whole));
      }
      if (tile->zeros) {
        __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
        found = _mm512_fnmadd_ps(zero, _mm512_set1_ps(total), found);
      }
      const __m512 scale = _mm512_mul_ps(scales16(weight->scale_kind, tile->scales, index), factor);
      STORE(sums + 16 * block, _mm512_fmadd_ps(found, scale, LOAD(__m512, sums + 16 * block)));
    }
  }
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
