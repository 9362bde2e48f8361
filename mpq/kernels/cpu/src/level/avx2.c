/* AVX2: exact 16-bit products of levels and 16-bit activations. */
#include "../tile.h"
#ifdef MPQ_X86
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "common.h"

INLINE void dot(const uint8_t *levels, const int16_t *x, int segment, int32_t *sums) {
  for (int half = 0; half < 2; half++) { /* 32 rows: eight sums of four rows, as pairs of columns */
    __m256i total[8];
    for (int i = 0; i < 8; i++) total[i] = _mm256_setzero_si256();
    for (int quad = 0; quad < segment / 4; quad++) {
      const uint8_t *from = levels + 256 * quad + 128 * half;
      const __m256i columns = _mm256_set1_epi64x(LOAD(int64_t, x + 4 * quad));
      for (int i = 0; i < 8; i++) {
        __m256i level = _mm256_cvtepu8_epi16(LOAD(__m128i, from + 16 * i));
        total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(level, columns));
      }
    }
    for (int i = 0; i < 8; i += 2) {
      __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(total[i], total[i + 1]), 0xd8);
      int32_t *to = sums + 32 * half + 4 * i;
      STORE(to, _mm256_add_epi32(LOAD(__m256i, to), pairs));
    }
  }
}
#define LEVEL_DOT dot
#include "multiply.h"
#include "avx2_integers.h"
#include "attend.h"

const mpq_decoder_ops mpq_avx2_ops = {normalize, activate, attend};
const mpq_level mpq_avx2 = {"avx2", 0, 0, quantize, decode, multiply, NULL, NULL, &mpq_avx2_ops};
#endif
