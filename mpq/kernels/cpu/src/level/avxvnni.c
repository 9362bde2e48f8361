/* AVX2 with VNNI: exact int8 dot products of levels and 16-bit activations split into two planes. */
#include "../tile.h"
#ifdef MPQ_X86
#include <immintrin.h>
#define TARGET __attribute__((target("avxvnni,avx2,fma,f16c")))
#include "common.h"

INLINE void dot(const uint8_t *levels, const int16_t *x, int segment, int32_t *sums) {
  int8_t low[MAX_TILE_COLUMNS], high[MAX_TILE_COLUMNS]; /* x = low + 256 high */
  for (int i = 0; i < segment; i++) high[i] = (int8_t)((x[i] + 128) >> 8), low[i] = (int8_t)x[i];
  for (int half = 0; half < 2; half++) { /* 32 rows: four vectors of eight */
    __m256i small[4], large[4];
    for (int i = 0; i < 4; i++) small[i] = large[i] = _mm256_setzero_si256();
    for (int quad = 0; quad < segment / 4; quad++) {
      const __m256i lows = _mm256_set1_epi32(LOAD(int32_t, low + 4 * quad));
      const __m256i highs = _mm256_set1_epi32(LOAD(int32_t, high + 4 * quad));
      for (int i = 0; i < 4; i++) {
        const __m256i level = LOAD(__m256i, levels + 256 * quad + 128 * half + 32 * i);
        small[i] = _mm256_dpbusd_avx_epi32(small[i], level, lows);
        large[i] = _mm256_dpbusd_avx_epi32(large[i], level, highs);
      }
    }
    for (int i = 0; i < 4; i++) {
      int32_t *to = sums + 32 * half + 8 * i;
      const __m256i whole = _mm256_add_epi32(small[i], _mm256_slli_epi32(large[i], 8));
      STORE(to, _mm256_add_epi32(LOAD(__m256i, to), whole));
    }
  }
}
#define LEVEL_DOT dot
#include "multiply.h"

const mpq_level mpq_avxvnni = {"avxvnni", 0, 0, quantize, decode, multiply, NULL, NULL, &mpq_avx2_ops};
#endif
