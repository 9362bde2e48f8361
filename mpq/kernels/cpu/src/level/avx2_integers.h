/* Products of pairs of 16-bit numbers, and float16, for attention; see integers.h. */
#ifndef MPQ_AVX2_INTEGERS_H
#define MPQ_AVX2_INTEGERS_H
#include <immintrin.h>

#ifndef TARGET
#define TARGET __attribute__((target("avx2,fma,f16c")))
#endif
#include "common.h"

typedef struct {
  __m256i half[2];
} avx2_pair;

INLINE vint32 dot_pairs(vint32 sums, vuint32 levels, int32_t pair) {
  const avx2_pair level = LOAD(avx2_pair, &levels);
  avx2_pair sum = LOAD(avx2_pair, &sums);
  for (int i = 0; i < 2; i++)
    sum.half[i] = _mm256_add_epi32(sum.half[i], _mm256_madd_epi16(level.half[i], _mm256_set1_epi32(pair)));
  return LOAD(vint32, &sum);
}
#define LEVEL_DOT_PAIRS dot_pairs

INLINE vfloat load_halves(const uint8_t *from) {
  const struct { __m256 half[2]; } both = {{_mm256_cvtph_ps(LOAD(__m128i, from)), _mm256_cvtph_ps(LOAD(__m128i, from + 16))}};
  return LOAD(vfloat, &both);
}
#define LEVEL_LOAD_HALVES load_halves
#endif
