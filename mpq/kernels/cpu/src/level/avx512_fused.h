/* Up to four tokens: decode codes in registers and multiply at once, without a decoded tile in memory. */
#ifndef MPQ_AVX512_FUSED_H
#define MPQ_AVX512_FUSED_H
#include "avx512.h"


/* Decode a quad's four steps to levels; TABLE16 stays codes. Block i's levels are 2**code_shift times too large. */
INLINE void decode_quad(const int bits, const int kind, const uint8_t *codes, __m512i table, __m512i byte_of, __m512i shifts,
                        __m512i out[4]) {
  const int each = 8 % bits ? 1 : 8 / bits; /* steps in 64 bytes */
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    if (each == 1 && bits < 8) {
      const __m512i bytes = _mm512_permutexvar_epi8(byte_of, LOAD(__m512i, codes + 8 * bits * i));
      out[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), _mm512_set1_epi8((char)((1 << bits) - 1)));
    } else {
      out[i] = LOAD(__m512i, codes + i / each * 64);
      if (kind == MPQ_INTEGER && each > 1) /* mask only; code_shift accounts for the missing shift */
        out[i] = _mm512_and_si512(out[i], _mm512_set1_epi8((char)(((1 << bits) - 1) << i % each * bits)));
      else if (i % each) /* tables repeat every 16 entries: higher bits do not matter */
        out[i] = _mm512_srli_epi16(out[i], i % each * bits);
      if (kind != MPQ_INTEGER && bits == 2) out[i] = _mm512_and_si512(out[i], _mm512_set1_epi8(3));
    }
    if (kind == MPQ_TABLE8) out[i] = _mm512_permutexvar_epi8(out[i], table);
  }
}

/* Prefetch part of the stream, `ahead` being PREFETCH_L2_BYTES before its use. In stream order, so that the hardware
 * prefetcher still follows it. */
INLINE void prefetch_stream(const uint8_t *ahead, const int bytes) {
  for (int line = 0; line < bytes; line += 64) {
    _mm_prefetch((const char *)ahead + line, _MM_HINT_T1);
    _mm_prefetch((const char *)ahead + line - PREFETCH_L2_BYTES + PREFETCH_L1_BYTES, _MM_HINT_T0);
  }
}

INLINE int code_shift(const int bits, const int kind, int block) {
  return kind == MPQ_INTEGER && bits < 8 && 8 % bits == 0 ? block % (8 / bits) * bits : 0;
}

/* _mm512_dpbusd_epi32 in assembly: GCC 12 copies the accumulator to another register and back in every iteration. */
INLINE void dpbusd(__m512i *sums, __m512i levels, __m512i columns) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(levels), "v"(columns));
}

/* Load a segment's 64 scales; returns a power of two that they are still to be multiplied by. */
INLINE float load_scales64(int kind, const uint8_t *scales, __m512 out[4]) {
  if (kind == MPQ_SCALE_E4M3 || kind == MPQ_SCALE_UE5M3) { /* float16 with another bias, or without a sign */
    uint16_t halves[PANEL_ROWS]; /* converted from memory: a register source would load the shuffle port */
    for (int half = 0; half < 2; half++) {
      const __m256i codes = LOAD(__m256i, scales + 32 * half);
      const __m512i bits = _mm512_slli_epi16(kind == MPQ_SCALE_E4M3 ? _mm512_cvtepi8_epi16(codes) : _mm512_cvtepu8_epi16(codes), 7);
      STORE(halves + 32 * half, kind == MPQ_SCALE_E4M3 ? _mm512_and_si512(bits, _mm512_set1_epi16((short)0xbfff)) : bits);
    }
    for (int block = 0; block < 4; block++) out[block] = _mm512_cvtph_ps(LOAD(__m256i, halves + 16 * block));
    return kind == MPQ_SCALE_E4M3 ? 256 : 1;
  }
  for (int block = 0; block < 4; block++) {
    const int index = 16 * block;
    if (kind == MPQ_SCALE_FP16) out[block] = load_scales16(MPQ_SCALE_FP16, scales, index);
    else if (kind == MPQ_SCALE_E8M0) out[block] = load_scales16(MPQ_SCALE_E8M0, scales, index);
    else if (kind == MPQ_SCALE_BF16) out[block] = load_scales16(MPQ_SCALE_BF16, scales, index);
    else out[block] = load_scales16(MPQ_SCALE_FP32, scales, index);
  }
  return 1;
}

/* sums (tokens, 64) += one tile's products for `count` tokens from `start` on. A segment's sums fit 32 bits even when
 * scaled by 2**code_shift; intermediate sums may wrap. Loops are unrolled so that GCC keeps the arrays in registers. */
INLINE void fused_tokens(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                         const int kind, const int planes, const int tokens, const int start, const int count,
                         float *sums) {
  const int width = weight->segment * weight->segments, is_int16 = kind == MPQ_TABLE16;
  const uint8_t *codes = tile->levels[0], *scales = tile->scales, *zeros = tile->zeros, *ahead = codes + PREFETCH_L2_BYTES;
  const int8_t *q = x->q + (tile->index * planes * tokens + start) * width;
  const int32_t *sum = x->sums + tile->index * weight->segments * planes * tokens + start;
  sums += PANEL_ROWS * start;
  const __m512i table[2] = {LOAD(__m512i, weight->low), LOAD(__m512i, weight->high)};
  uint8_t byte_of[64], shift[64];
  for (int i = 0; i < 64; i++) byte_of[i] = i / 8 * bits + i % 8, shift[i] = i % 8 * bits;
  const __m512i bytes_of = LOAD(__m512i, byte_of), shifts = LOAD(__m512i, shift);
  __m512 totals[4][4];
#pragma GCC unroll 4
  for (int t = 0; t < count; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) totals[t][i] = LOAD(__m512, sums + PANEL_ROWS * t + 16 * i);
  for (int segment = 0; segment < weight->segments; segment++, q += weight->segment, sum += planes * tokens) {
    uint32_t total[4]; /* modulo 2^32: the sums of a token that is not finite mean nothing, and nobody reads them */
    __m512i dots[2][4][2][4]; /* level planes, tokens, activation planes, row blocks */
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
      total[t] = planes == 2 ? 256u * (uint32_t)sum[t] + (uint32_t)sum[tokens + t] : (uint32_t)sum[t];
#pragma GCC unroll 2
      for (int l = 0; l <= is_int16; l++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const uint32_t minus_offset = -((uint32_t)(is_int16 ? 128 * !l : weight->offset) * total[t]);
          dots[l][t][0][i] = _mm512_setzero_si512();
          dots[l][t][planes - 1][i] = _mm512_set1_epi32((int32_t)(minus_offset << code_shift(bits, kind, i)));
        }
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 32 * bits, ahead += 32 * bits) {
      __m512i level[4];
      if (!start) prefetch_stream(ahead, 32 * bits);
      decode_quad(bits, kind, codes, table[0], bytes_of, shifts, level);
#pragma GCC unroll 2
      for (int l = 0; l <= is_int16; l++) {
        __m512i values[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) values[i] = is_int16 ? _mm512_permutexvar_epi8(level[i], table[!l]) : level[i];
#pragma GCC unroll 4
        for (int t = 0; t < count; t++)
#pragma GCC unroll 2
          for (int p = 0; p < planes; p++) {
            const __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + (p * tokens + t) * width + 4 * quad));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) dpbusd(&dots[l][t][p][i], values[i], columns);
          }
      }
    }
    __m512 scale[4];
    const float unit = weight->factor * load_scales64(weight->scale_kind, scales, scale);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const float unshift = 1 << code_shift(bits, kind, i);
#pragma GCC unroll 4
      for (int t = 0; t < count; t++) {
        const float factor = x->scale[tile->index * tokens + start + t] * (unit / unshift);
        __m512 values = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int l = 0; l <= is_int16; l++) {
          __m512i whole = dots[l][t][0][i];
          if (planes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), dots[l][t][1][i]);
          values = l ? _mm512_fmadd_ps(values, _mm512_set1_ps(256), _mm512_cvtepi32_ps(whole)) : _mm512_cvtepi32_ps(whole);
        }
        if (zeros) {
          const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, zeros + 16 * i)));
          values = _mm512_fnmadd_ps(zero, _mm512_set1_ps((float)(int32_t)total[t] * unshift), values);
        }
        totals[t][i] = _mm512_fmadd_ps(values, _mm512_mul_ps(scale[i], _mm512_set1_ps(factor)), totals[t][i]);
      }
    }
    if (weight->row_scales) continue;
    const int extras = PANEL_ROWS * (weight->scale_bytes + !!zeros);
    if (!start) prefetch_stream(ahead, extras);
    ahead += extras, scales += PANEL_ROWS * weight->scale_bytes;
    if (zeros) zeros += PANEL_ROWS;
  }
#pragma GCC unroll 4
  for (int t = 0; t < count; t++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) STORE(sums + PANEL_ROWS * t + 16 * i, totals[t][i]);
}

/* As many tokens at once as accumulators fit registers; the rest re-reads the codes from L1. */
INLINE void fused_int8(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int bits,
                       const int kind, const int planes, const int tokens, float *sums) {
  const int most = 6 / (kind == MPQ_TABLE16 ? 2 * planes : planes), first = tokens < most ? tokens : most;
  fused_tokens(weight, tile, x, bits, kind, planes, tokens, 0, first, sums);
  if (first < tokens) fused_tokens(weight, tile, x, bits, kind, planes, tokens, first, tokens - first, sums);
}

/* Decode 64 fp8 codes to bf16: columns 0 and 1 of sixteen rows, then 2 and 3. Normal numbers by moving bits and
 * rebiasing the exponent with an xor; subnormals by lookup. */
INLINE void decode_fp8(const mpq_weight *weight, __m512i code, __m512i out[2]) {
  __m512i bottom = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64((int64_t)weight->low_matrix), 0);
  __m512i top = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64((int64_t)weight->high_matrix), 0);
  const __mmask64 small = _mm512_testn_epi8_mask(code, _mm512_set1_epi8((char)weight->normal_mask));
  top = _mm512_xor_si512(top, _mm512_set1_epi8((char)weight->high_flip));
  if (__builtin_expect(small != 0, 0)) {
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8((char)0x80));
    bottom = _mm512_mask_permutexvar_epi8(bottom, small, code, LOAD(__m512i, weight->low));
    top = _mm512_mask_permutexvar_epi8(top, small, code, LOAD(__m512i, weight->high));
    top = _mm512_or_si512(top, sign);
  }
  out[0] = _mm512_unpacklo_epi8(bottom, top), out[1] = _mm512_unpackhi_epi8(bottom, top);
}

/* sums (tokens, 64) += one tile's products of fp8 weights and float32 activations. */
INLINE void fused_fp32(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, const int tokens,
                       float *sums) {
  const int width = weight->segment * weight->segments;
  const uint8_t *codes = tile->levels[0], *scales = tile->scales, *ahead = codes + PREFETCH_L2_BYTES;
  const float *columns = x->fp32 + tile->index * tokens * width;
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
  for (int segment = 0; segment < weight->segments; segment++, columns += weight->segment) {
    __m512 values[4][4];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) values[t][i] = _mm512_setzero_ps();
    for (int quad = 0; quad < weight->segment / 4; quad++, codes += 256, ahead += 256) {
      prefetch_stream(ahead, 256);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512i pairs[2];
        decode_fp8(weight, LOAD(__m512i, codes + 64 * i), pairs);
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
          const __m512 first = (__m512)_mm512_slli_epi32(pairs[pair], 16), second = (__m512)_mm512_and_si512(pairs[pair], odd);
#pragma GCC unroll 4
          for (int t = 0; t < tokens; t++) {
            const float *from = columns + t * width + 4 * quad + 2 * pair;
            values[t][i] = _mm512_fmadd_ps(first, _mm512_set1_ps(from[0]), values[t][i]);
            values[t][i] = _mm512_fmadd_ps(second, _mm512_set1_ps(from[1]), values[t][i]);
          }
        }
      }
    }
    __m512 scale[4];
    const float unit = weight->factor * load_scales64(weight->scale_kind, scales, scale);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        float *to = sums + PANEL_ROWS * t + 16 * i;
        STORE(to, _mm512_fmadd_ps(values[t][i], _mm512_mul_ps(scale[i], _mm512_set1_ps(unit)), LOAD(__m512, to)));
      }
    if (weight->row_scales) continue;
    prefetch_stream(ahead, PANEL_ROWS * weight->scale_bytes);
    ahead += PANEL_ROWS * weight->scale_bytes, scales += PANEL_ROWS * weight->scale_bytes;
  }
}

#define FUSED(bits) \
  case bits: \
    if (kind == MPQ_INTEGER) fused_int8(weight, tile, x, bits, MPQ_INTEGER, planes, tokens, sums); \
    else if (kind == MPQ_TABLE8) fused_int8(weight, tile, x, bits, MPQ_TABLE8, planes, tokens, sums); \
    else if (tokens * planes <= 4) fused_int8(weight, tile, x, bits, MPQ_TABLE16, planes, tokens, sums); \
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

#define FUSED_FP32(tokens) \
  static TARGET void fused_real_##tokens(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, float *sums) { \
    fused_fp32(weight, tile, x, tokens, sums); \
  }
FUSED_FP32(1) FUSED_FP32(2) FUSED_FP32(3) FUSED_FP32(4)

static TARGET void fused(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, float *sums) {
  static void (*const totals[3][4])(const mpq_weight *, const mpq_tile *, const mpq_activation *, float *) = {
      {fused_1_1, fused_1_2, fused_1_3, fused_1_4},
      {fused_2_1, fused_2_2, fused_2_3, fused_2_4},
      {fused_real_1, fused_real_2, fused_real_3, fused_real_4}};
  totals[weight->kind == MPQ_TABLE_BF16 ? 2 : x->planes - 1][x->tokens - 1](weight, tile, x, sums);
}
#endif
