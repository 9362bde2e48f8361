/* Dot products of int8 planes with strips of levels, for attention; see integers.h. */
#ifndef MPQ_AVX512_INTEGERS_H
#define MPQ_AVX512_INTEGERS_H
#include "avx512_fused.h"
#include "strips.h"

/* Accumulate the products of one step: level[strip] by `count` vectors of integers. */
INLINE void add_step(__m512i sums[4][2][2], const __m512i *level, const uint8_t *x, int64_t stride, int64_t plane,
                     const int count, const int planes, const int strips) {
#pragma GCC unroll 4
  for (int i = 0; i < count; i++)
#pragma GCC unroll 2
    for (int p = 0; p < planes; p++) {
      const __m512i columns = _mm512_set1_epi32(LOAD(int32_t, x + i * stride + p * plane));
#pragma GCC unroll 2
      for (int s = 0; s < strips; s++) dpbusd(&sums[i][p][s], level[s], columns);
    }
}

INLINE void dot_strips_in(const level_strips *from, const uint8_t *x, int64_t stride, int64_t plane, const int count,
                          const int planes, const int strips, const int nibbles, vint32 *dots) {
  __m512i sums[4][2][2];
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int i = 0; i < count; i++)
#pragma GCC unroll 2
    for (int p = 0; p < planes; p++)
#pragma GCC unroll 2
      for (int s = 0; s < strips; s++) sums[i][p][s] = _mm512_setzero_si512();
  for (int64_t step = 0; step < from->steps; step += 1 + nibbles) {
    __m512i level[2], next[2];
#pragma GCC unroll 2
    for (int s = 0; s < strips; s++) {
      level[s] = LOAD(__m512i, from->levels + s * from->apart + (64 >> nibbles) * step);
      if (nibbles) next[s] = _mm512_and_si512(_mm512_srli_epi16(level[s], 4), mask), level[s] = _mm512_and_si512(level[s], mask);
      prefetch_step(from, s, step);
    }
    add_step(sums, level, x + 4 * step, stride, plane, count, planes, strips);
    if (nibbles) add_step(sums, next, x + 4 * step + 4, stride, plane, count, planes, strips);
  }
#pragma GCC unroll 2
  for (int s = 0; s < strips; s++)
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      __m512i whole = sums[i][0][s];
      if (planes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), sums[i][1][s]);
      dots[s * count + i] = (vint32)whole;
    }
}

INLINE void dot_strips(const level_strips *from, const uint8_t *x, int64_t stride, int64_t plane, const int count,
                       const int planes, const int strips, vint32 *dots) {
  if (from->nibbles) dot_strips_in(from, x, stride, plane, count, planes, strips, 1, dots);
  else dot_strips_in(from, x, stride, plane, count, planes, strips, 0, dots);
}
#define LEVEL_DOT_STRIPS dot_strips
#define LEVEL_DECODE decode
#define LEVEL_DOTS_NIBBLES 1

INLINE vfloat load_halves(const uint8_t *from) { return (vfloat)_mm512_cvtph_ps(LOAD(__m256i, from)); }
#define LEVEL_LOAD_HALVES load_halves

/* Sixteen e4m3, with NaN: float16 whose exponents are 8 too small. */
INLINE vfloat load_e4m3(const uint8_t *from) {
  const __m256i code = _mm256_cvtepu8_epi16(LOAD(__m128i, from)), size = _mm256_set1_epi16(0x7f);
  const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(code, size), 7);
  __m256i half = _mm256_or_si256(magnitude, _mm256_and_si256(_mm256_slli_epi16(code, 8), _mm256_set1_epi16((short)0x8000)));
  half = _mm256_mask_mov_epi16(half, _mm256_cmpeq_epi16_mask(magnitude, _mm256_slli_epi16(size, 7)), _mm256_set1_epi16(0x7e00));
  return (vfloat)_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
}
#define LEVEL_LOAD_E4M3 load_e4m3
#endif
