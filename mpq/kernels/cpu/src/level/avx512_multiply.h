/* AVX-512 products of decoded tiles: int8 dot products, or float32 for bf16 weights. */
#ifndef MPQ_AVX512_MULTIPLY_H
#define MPQ_AVX512_MULTIPLY_H
#include "avx512_fused.h"


/* `count` tokens from `token` on: int8 activation planes times one or two planes of levels. */
INLINE void multiply_int8(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t token,
                          const int count, const int planes, const int is_int16, float *sums) {
  const int width = weight->segment * weight->segments;
  const int8_t *q = x->q + (tile->index * planes * x->tokens + token) * width;
  for (int segment = 0; segment < weight->segments; segment++) {
    const int32_t *sum = x->sums + (tile->index * weight->segments + segment) * planes * x->tokens + token;
    __m512 values[3][4];
    for (int plane = 0; plane <= is_int16; plane++) {
      const int offset = is_int16 ? 128 * !plane : weight->offset;
      const uint8_t *levels = tile->levels[plane] + 64 * (size_t)weight->segment * segment;
      __m512i dots[3][2][4];
      for (int t = 0; t < count; t++)
        for (int p = 0; p < planes; p++)
          for (int block = 0; block < 4; block++) dots[t][p][block] = _mm512_set1_epi32(-offset * sum[p * x->tokens + t]);
      for (int quad = 0; quad < weight->segment / 4; quad++, levels += 256) {
        __m512i level[4];
        for (int block = 0; block < 4; block++) level[block] = LOAD(__m512i, levels + 64 * block);
        for (int t = 0; t < count; t++)
          for (int p = 0; p < planes; p++) {
            __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + (p * x->tokens + t) * width + 4 * quad));
            for (int block = 0; block < 4; block++)
              dots[t][p][block] = _mm512_dpbusd_epi32(dots[t][p][block], level[block], columns);
          }
      }
      for (int t = 0; t < count; t++)
        for (int block = 0; block < 4; block++) {
          __m512 value = _mm512_cvtepi32_ps(dots[t][0][block]);
          if (planes == 2) value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(dots[t][1][block]));
          values[t][block] = plane ? _mm512_fmadd_ps(values[t][block], _mm512_set1_ps(256), value) : value;
        }
    }
    q += weight->segment;
    for (int block = 0; block < 4; block++) {
      const int index = PANEL_ROWS * segment + 16 * block;
      __m512 scale = load_scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index);
      __m512 zero = _mm512_setzero_ps();
      if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
      for (int t = 0; t < count; t++) {
        float *to = sums + (token + t) * PANEL_ROWS + 16 * block;
        if (tile->zeros) {
          float total = planes == 2 ? 256.f * sum[t] + sum[x->tokens + t] : sum[t];
          values[t][block] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(total), values[t][block]);
        }
        __m512 factor = _mm512_set1_ps(x->scale[tile->index * x->tokens + token + t] * weight->factor);
        STORE(to, _mm512_fmadd_ps(values[t][block], _mm512_mul_ps(scale, factor), LOAD(__m512, to)));
      }
    }
  }
}

/* One token: bf16 weights times float32 activations. */
INLINE void multiply_fp32(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t token,
                          float *sums) {
  const int width = weight->segment * weight->segments;
  const float *columns = x->fp32 + (tile->index * x->tokens + token) * width;
  const uint8_t *levels = tile->levels[0];
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 values[2][4];
    for (int block = 0; block < 4; block++) values[0][block] = values[1][block] = _mm512_setzero_ps();
    for (int quad = 0; quad < weight->segment / 4; quad++, columns += 4)
      for (int pair = 0; pair < 2; pair++)
        for (int block = 0; block < 4; block++, levels += 64) {
          __m512i both = LOAD(__m512i, levels);
          __m512 even = (__m512)_mm512_slli_epi32(both, 16);
          __m512 odd = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
          values[0][block] = _mm512_fmadd_ps(even, _mm512_set1_ps(columns[2 * pair]), values[0][block]);
          values[1][block] = _mm512_fmadd_ps(odd, _mm512_set1_ps(columns[2 * pair + 1]), values[1][block]);
        }
    for (int block = 0; block < 4; block++) {
      const int index = weight->row_scales ? 16 * block : PANEL_ROWS * segment + 16 * block;
      __m512 scale = _mm512_mul_ps(load_scales16(weight->scale_kind, tile->scales, index), _mm512_set1_ps(weight->factor));
      float *to = sums + token * PANEL_ROWS + 16 * block;
      STORE(to, _mm512_fmadd_ps(_mm512_add_ps(values[0][block], values[1][block]), scale, LOAD(__m512, to)));
    }
  }
}

#define TOKENS(count) \
  if (planes == 2 && !is_int16) multiply_int8(weight, tile, x, token, count, 2, 0, sums); \
  else if (planes == 2) multiply_int8(weight, tile, x, token, count, 2, 1, sums); \
  else if (!is_int16) multiply_int8(weight, tile, x, token, count, 1, 0, sums); \
  else multiply_int8(weight, tile, x, token, count, 1, 1, sums);

INLINE void multiply_tile(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                          int64_t last, float *sums) {
  const int planes = x->planes, is_int16 = weight->kind == MPQ_TABLE16;
  if (weight->kind == MPQ_TABLE_BF16) {
    for (int64_t token = first; token < last; token++) multiply_fp32(weight, tile, x, token, sums);
    return;
  }
  for (int64_t token = first; token < last;) {
    const int64_t left = last - token, count = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
    if (count == 3) { TOKENS(3) } else if (count == 2) { TOKENS(2) } else { TOKENS(1) }
    token += count;
  }
}

static TARGET void multiply_vectors(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                    int64_t first, int64_t last, float *sums) {
  for (int i = 0; i < count; i++)
    if (x->path == PATH_FUSED) fused(weight, tiles + i, x, sums);
    else multiply_tile(weight, tiles + i, x, first, last, sums);
}
#endif
