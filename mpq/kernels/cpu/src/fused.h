/* Up to four tokens: codes are decoded in registers and multiplied at once. */

/* The four steps of a quad as levels, those of TABLE16 still codes; a block's are 2**shift_of times as large. */
INLINE void levels256(const int bits, const int kind, const uint8_t *codes, __m512i table, __m512i spread, __m512i shifts,
                      __m512i out[4]) {
  const int each = 8 % bits ? 1 : 8 / bits; /* steps in 64 bytes */
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    if (each == 1 && bits < 8) {
      const __m512i bytes = _mm512_permutexvar_epi8(spread, LOAD(__m512i, codes + 8 * bits * i));
      out[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), _mm512_set1_epi8((char)((1 << bits) - 1)));
    } else {
      out[i] = LOAD(__m512i, codes + i / each * 64);
      if (kind == MPQ_INTEGER && each > 1) /* masked, not shifted */
        out[i] = _mm512_and_si512(out[i], _mm512_set1_epi8((char)(((1 << bits) - 1) << i % each * bits)));
      else if (i % each) /* tables of 16 repeat: what stands above a code does not matter */
        out[i] = _mm512_srli_epi16(out[i], i % each * bits);
      if (kind != MPQ_INTEGER && bits == 2) out[i] = _mm512_and_si512(out[i], _mm512_set1_epi8(3));
    }
    if (kind == MPQ_TABLE8) out[i] = _mm512_permutexvar_epi8(out[i], table);
  }
}

/* Asks for bytes of the stream, `ahead` being MPQ_AHEAD before its use: far enough for the memory, and not in an order
 * that the processor's own prefetching would not follow. */
INLINE void ask_ahead(const uint8_t *ahead, const int bytes) {
  for (int line = 0; line < bytes; line += 64) {
    _mm_prefetch((const char *)ahead + line, _MM_HINT_T1);
    _mm_prefetch((const char *)ahead + line - MPQ_AHEAD + MPQ_NEAR, _MM_HINT_T0);
  }
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
    uint16_t halves[MPQ_ROWS]; /* converted from memory, which leaves the shuffling unit alone */
    for (int half = 0; half < 2; half++) {
      const __m256i codes = LOAD(__m256i, scales + 32 * half);
      const __m512i bits = _mm512_slli_epi16(kind == MPQ_E4M3 ? _mm512_cvtepi8_epi16(codes) : _mm512_cvtepu8_epi16(codes), 7);
      STORE(halves + 32 * half, kind == MPQ_E4M3 ? _mm512_and_si512(bits, _mm512_set1_epi16((short)0xbfff)) : bits);
    }
    for (int block = 0; block < 4; block++) out[block] = _mm512_cvtph_ps(LOAD(__m256i, halves + 16 * block));
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

/* sums (tokens, 64) += the part of a tile for `count` tokens from `start` on. Sums of a segment are whole numbers below
 * 2**31, also when they are 2**shift_of times as large; on the way they may wrap. Loops are unrolled so that GCC keeps
 * what they index in registers. */
INLINE void fused_some(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                       const int kind, const int planes, const int tokens, const int start, const int count,
                       float *sums) {
  const int width = weight->segment * weight->segments, two = kind == MPQ_TABLE16;
  const uint8_t *codes = tile->levels[0], *scales = tile->scales, *zeros = tile->zeros, *ahead = codes + MPQ_AHEAD;
  const int8_t *q = x->q + (tile->index * planes * tokens + start) * width;
  const int32_t *sum = x->sums + tile->index * weight->segments * planes * tokens + start;
  sums += MPQ_ROWS * start;
  const __m512i table[2] = {LOAD(__m512i, weight->low), LOAD(__m512i, weight->high)};
  uint8_t spread[64], shift[64];
  for (int i = 0; i < 64; i++) spread[i] = i / 8 * bits + i % 8, shift[i] = i % 8 * bits;
  const __m512i spreads = LOAD(__m512i, spread), shifts = LOAD(__m512i, shift);
  __m512 all[4][4];
#pragma GCC unroll 4
  for (int t = 0; t < count; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) all[t][i] = LOAD(__m512, sums + MPQ_ROWS * t + 16 * i);
  for (int segment = 0; segment < weight->segments; segment++, q += weight->segment, sum += planes * tokens) {
    int32_t total[4];
    __m512i dots[2][4][2][4]; /* level planes, tokens, planes, blocks */
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
      total[t] = planes == 2 ? 256 * sum[t] + sum[tokens + t] : sum[t];
#pragma GCC unroll 2
      for (int l = 0; l <= two; l++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const uint32_t less = -(uint32_t)((two ? 128 * !l : weight->offset) * total[t]);
          dots[l][t][0][i] = _mm512_setzero_si512();
          dots[l][t][planes - 1][i] = _mm512_set1_epi32((int32_t)(less << shift_of(bits, kind, i)));
        }
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 32 * bits, ahead += 32 * bits) {
      __m512i level[4];
      if (!start) ask_ahead(ahead, 32 * bits);
      levels256(bits, kind, codes, table[0], spreads, shifts, level);
#pragma GCC unroll 2
      for (int l = 0; l <= two; l++) {
        __m512i found[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) found[i] = two ? _mm512_permutexvar_epi8(level[i], table[!l]) : level[i];
#pragma GCC unroll 4
        for (int t = 0; t < count; t++)
#pragma GCC unroll 2
          for (int p = 0; p < planes; p++) {
            const __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + (p * tokens + t) * width + 4 * quad));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) add_dots(&dots[l][t][p][i], found[i], columns);
          }
      }
    }
    __m512 scale[4];
    const float unit = weight->factor * scales64(weight->scale_kind, scales, scale);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const float times = 1 << shift_of(bits, kind, i);
#pragma GCC unroll 4
      for (int t = 0; t < count; t++) {
        const float factor = x->scale[tile->index * tokens + start + t] * (unit / times);
        __m512 found = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int l = 0; l <= two; l++) {
          __m512i whole = dots[l][t][0][i];
          if (planes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), dots[l][t][1][i]);
          found = l ? _mm512_fmadd_ps(found, _mm512_set1_ps(256), _mm512_cvtepi32_ps(whole)) : _mm512_cvtepi32_ps(whole);
        }
        if (zeros) {
          const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, zeros + 16 * i)));
          found = _mm512_fnmadd_ps(zero, _mm512_set1_ps((float)total[t] * times), found);
        }
        all[t][i] = _mm512_fmadd_ps(found, _mm512_mul_ps(scale[i], _mm512_set1_ps(factor)), all[t][i]);
      }
    }
    if (weight->row_scales) continue;
    const int extras = MPQ_ROWS * (weight->scale_bytes + !!zeros);
    if (!start) ask_ahead(ahead, extras);
    ahead += extras, scales += MPQ_ROWS * weight->scale_bytes;
    if (zeros) zeros += MPQ_ROWS;
  }
#pragma GCC unroll 4
  for (int t = 0; t < count; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) STORE(sums + MPQ_ROWS * t + 16 * i, all[t][i]);
}

/* As many tokens at once as there are registers for the sums of; the rest meets codes in the first cache. */
INLINE void fused_bytes(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                        const int kind, const int planes, const int tokens, float *sums) {
  const int most = 6 / (kind == MPQ_TABLE16 ? 2 * planes : planes), first = tokens < most ? tokens : most;
  fused_some(weight, tile, x, bits, kind, planes, tokens, 0, first, sums);
  if (first < tokens) fused_some(weight, tile, x, bits, kind, planes, tokens, first, tokens - first, sums);
}

/* The bfloat16 of 64 codes, columns 0 and 1 of sixteen rows, then 2 and 3. Normal numbers' bits are moved and their
 * exponents flipped into place; the few others are looked up. */
INLINE void bfloats64(const mpq_weight *weight, __m512i code, __m512i out[2]) {
  __m512i bottom = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64((int64_t)weight->bits_of_low), 0);
  __m512i top = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64((int64_t)weight->bits_of_high), 0);
  const __mmask64 small = _mm512_testn_epi8_mask(code, _mm512_set1_epi8((char)weight->normal));
  top = _mm512_xor_si512(top, _mm512_set1_epi8((char)weight->flip));
  if (__builtin_expect(small != 0, 0)) {
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8((char)0x80));
    bottom = _mm512_mask_permutexvar_epi8(bottom, small, code, LOAD(__m512i, weight->low));
    top = _mm512_mask_permutexvar_epi8(top, small, code, LOAD(__m512i, weight->high));
    top = _mm512_or_si512(top, sign);
  }
  out[0] = _mm512_unpacklo_epi8(bottom, top), out[1] = _mm512_unpackhi_epi8(bottom, top);
}

/* sums (tokens, 64) += the part of a tile of 8-bit floats, activations as they are. */
INLINE void fused_real(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int tokens,
                       float *sums) {
  const int width = weight->segment * weight->segments;
  const uint8_t *codes = tile->levels[0], *scales = tile->scales, *ahead = codes + MPQ_AHEAD;
  const float *real = x->real + tile->index * tokens * width;
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
  for (int segment = 0; segment < weight->segments; segment++, real += weight->segment) {
    __m512 found[4][4];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) found[t][i] = _mm512_setzero_ps();
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 256, ahead += 256) {
      ask_ahead(ahead, 256);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512i pairs[2];
        bfloats64(weight, LOAD(__m512i, codes + 64 * i), pairs);
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
          const __m512 first = (__m512)_mm512_slli_epi32(pairs[pair], 16), second = (__m512)_mm512_and_si512(pairs[pair], odd);
#pragma GCC unroll 4
          for (int t = 0; t < tokens; t++) {
            const float *columns = real + t * width + 4 * quad + 2 * pair;
            found[t][i] = _mm512_fmadd_ps(first, _mm512_set1_ps(columns[0]), found[t][i]);
            found[t][i] = _mm512_fmadd_ps(second, _mm512_set1_ps(columns[1]), found[t][i]);
          }
        }
      }
    }
    __m512 scale[4];
    const float unit = weight->factor * scales64(weight->scale_kind, scales, scale);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        float *to = sums + MPQ_ROWS * t + 16 * i;
        STORE(to, _mm512_fmadd_ps(found[t][i], _mm512_mul_ps(scale[i], _mm512_set1_ps(unit)), LOAD(__m512, to)));
      }
    if (weight->row_scales) continue;
    ask_ahead(ahead, MPQ_ROWS * weight->scale_bytes);
    ahead += MPQ_ROWS * weight->scale_bytes, scales += MPQ_ROWS * weight->scale_bytes;
  }
}

#define FUSED(bits) \
  case bits: \
    if (kind == MPQ_INTEGER) fused_bytes(weight, tile, x, bits, MPQ_INTEGER, planes, tokens, sums); \
    else if (kind == MPQ_TABLE8) fused_bytes(weight, tile, x, bits, MPQ_TABLE8, planes, tokens, sums); \
    else if (tokens * planes <= 4) fused_bytes(weight, tile, x, bits, MPQ_TABLE16, planes, tokens, sums); \
    break;

INLINE void fused_any(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int planes,
                      const int tokens, float *sums) {
  const int kind = weight->kind;
  switch (weight->bits) { FUSED(2) FUSED(3) FUSED(4) FUSED(5) FUSED(6) FUSED(7) FUSED(8) }
}

#define FUSED_TOKENS(planes, tokens) \
  static TARGET void fused_##planes##_##tokens(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, \
                                               float *sums) { \
    fused_any(weight, tile, x, planes, tokens, sums); \
  }
FUSED_TOKENS(1, 1) FUSED_TOKENS(1, 2) FUSED_TOKENS(1, 3) FUSED_TOKENS(1, 4)
FUSED_TOKENS(2, 1) FUSED_TOKENS(2, 2) FUSED_TOKENS(2, 3) FUSED_TOKENS(2, 4)

#define FUSED_REAL(tokens) \
  static TARGET void fused_real_##tokens(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, float *sums) { \
    fused_real(weight, tile, x, tokens, sums); \
  }
FUSED_REAL(1) FUSED_REAL(2) FUSED_REAL(3) FUSED_REAL(4)

static TARGET void fused(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, float *sums) {
  static void (*const all[3][4])(const mpq_weight *, const mpq_tile *, const mpq_activation *, float *) = {
      {fused_1_1, fused_1_2, fused_1_3, fused_1_4},
      {fused_2_1, fused_2_2, fused_2_3, fused_2_4},
      {fused_real_1, fused_real_2, fused_real_3, fused_real_4}};
  all[weight->kind == MPQ_BFLOAT ? 2 : x->planes - 1][x->tokens - 1](weight, tile, x, sums);
}
