/* Attention to a block of codes whose 64 tokens share a scale and a minimum for each column, as KIVI's keys do
 * (arXiv 2402.02750): scales of keys multiply the queries, which are rounded to integers for each block; those of
 * values, the sums. */
#ifndef MPQ_ATTEND_COLUMNS_H
#define MPQ_ATTEND_COLUMNS_H
#include "attend_codes.h"

/* scores (count, 64) of queries (count, padded width), which have the scale of scores. */
INLINE void score_by_column(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const float *q, const int count,
                            float *scores) {
  const int64_t width = mpq_padded_width(block->vectors), apart = 16 * width;
  uint8_t integers[4 * 2 * MAX_HEAD_WIDTH] __attribute__((aligned(64)));
  folded by[4];
  for (int i = 0; i < count; i++)
    by[i] = fold_scales(block, 0, NULL, q + i * width, width, integers + i * 2 * width);
  for (int strip = 0; strip < 4; strip += 2) {
    vint32 dots[8];
    const level_strips from = strips_at(block, levels, ahead, strip * apart, apart, width / 4);
    LEVEL_DOT_STRIPS(&from, integers, 2 * width, width, count, 2, 2, dots);
    for (int s = 0; s < 2; s++)
      for (int i = 0; i < count; i++)
        STORE(scores + i * BLOCK + 16 * (strip + s), unfold(dots[s * count + i], by[i]) + by[i].bias);
  }
}

/* mixed (count, padded width) = mixed * decay + probabilities (count, 64) times the values. */
INLINE void mix_by_column(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const float *p, const float *decay,
                          const int count, float *mixed) {
  const int64_t width = mpq_padded_width(block->vectors);
  uint8_t integers[4 * 2 * BLOCK] __attribute__((aligned(64)));
  folded by[4]; /* bias: the sum of the probabilities, of which minima are multiples */
  for (int i = 0; i < count; i++) {
    int32_t sum = 0;
    vfloat weights = {0};
    for (int j = 0; j < BLOCK; j += 16) weights += LOAD(vfloat, p + i * BLOCK + j);
    const float scale = to_integers(p + i * BLOCK, BLOCK, 2, BLOCK, integers + i * 2 * BLOCK, &sum) * block->factor;
    by[i] = (folded){scale, sum16(weights), (uint32_t)block->middle * (uint32_t)sum};
  }
  for (int64_t column = 0; column < width;) {
    vint32 dots[8];
    const int strips = dot_values(block, levels, ahead, column, width, integers, count, dots);
    for (int s = 0; s < strips; s++, column += 16) {
      const vfloat scales = load_scale(block, column), minima = block->minima ? load_minimum(block, column) : (vfloat){0};
      for (int i = 0; i < count; i++) {
        float *to = mixed + i * width + column;
        const vfloat own = unfold(dots[s * count + i], by[i]) * scales + minima * by[i].bias;
        STORE(to, LOAD(vfloat, to) * decay[i] + own);
      }
    }
  }
}
#endif
