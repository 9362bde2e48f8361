/* Attention to a block of codes whose 64 tokens share a scale and a minimum for each column, as KIVI's keys do (arXiv
 * 2402.02750): scales of keys multiply the queries, which become integers anew for each block; those of values, the sums. */
#ifndef MPQ_ATTEND_COLUMNS_H
#define MPQ_ATTEND_COLUMNS_H
#include "attend_codes.h"

/* scores (count, 64) of queries (count, padded width), which have the scale of scores. */
INLINE void score_by_column(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const float *q, const int count,
                            float *scores) {
  const int64_t width = mpq_padded_width(block->vectors), apart = 16 * width;
  uint8_t integers[4 * 2 * MAX_HEAD_WIDTH] __attribute__((aligned(64)));
  float scale[4], bias[4];
  uint32_t offset[4];
  for (int i = 0; i < count; i++) {
    float scaled[MAX_HEAD_WIDTH] __attribute__((aligned(64)));
    vfloat minima = {0};
    int32_t sum = 0;
    for (int64_t j = 0; j < width; j += 16) {
      const vfloat some = LOAD(vfloat, q + i * width + j);
      STORE(scaled + j, some * load_scale(block, j));
      if (block->minima) minima += some * load_minimum(block, j);
    }
    scale[i] = to_integers(scaled, width, 2, width, integers + i * 2 * width, &sum) * block->factor;
    offset[i] = (uint32_t)block->middle * (uint32_t)sum;
    bias[i] = block->minima ? sum16(minima) : 0;
  }
  for (int strip = 0; strip < 4; strip += 2) {
    vint32 dots[8];
    const level_strips from = strips_at(block, levels, ahead, strip * apart, apart, width / 4);
    LEVEL_DOT_STRIPS(&from, integers, 2 * width, width, count, 2, 2, dots);
    for (int s = 0; s < 2; s++)
      for (int i = 0; i < count; i++) {
        const vint32 centered = (vint32)((vuint32)dots[s * count + i] - offset[i]);
        STORE(scores + i * BLOCK + 16 * (strip + s), __builtin_convertvector(centered, vfloat) * scale[i] + bias[i]);
      }
  }
}

/* mixed (count, padded width) = mixed * decay + probabilities (count, 64) times the values. */
INLINE void mix_by_column(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const float *p, const float *decay,
                          const int count, float *mixed) {
  const int64_t width = mpq_padded_width(block->vectors);
  uint8_t integers[4 * 2 * BLOCK] __attribute__((aligned(64)));
  float scale[4], weight[4];
  uint32_t offset[4];
  for (int i = 0; i < count; i++) {
    int32_t sum = 0;
    vfloat weights = {0};
    for (int j = 0; j < BLOCK; j += 16) weights += LOAD(vfloat, p + i * BLOCK + j);
    scale[i] = to_integers(p + i * BLOCK, BLOCK, 2, BLOCK, integers + i * 2 * BLOCK, &sum) * block->factor;
    offset[i] = (uint32_t)block->middle * (uint32_t)sum;
    weight[i] = sum16(weights);
  }
  for (int64_t column = 0; column < width;) {
    const int strips = width - column >= 32 ? 2 : 1;
    vint32 dots[8];
    const level_strips from = strips_at(block, levels, ahead, 64 * column, 16 * BLOCK, BLOCK / 4);
    if (strips == 2) LEVEL_DOT_STRIPS(&from, integers, 2 * BLOCK, BLOCK, count, 2, 2, dots);
    else LEVEL_DOT_STRIPS(&from, integers, 2 * BLOCK, BLOCK, count, 2, 1, dots);
    for (int s = 0; s < strips; s++, column += 16) {
      const vfloat scales = load_scale(block, column), minima = block->minima ? load_minimum(block, column) : (vfloat){0};
      for (int i = 0; i < count; i++) {
        float *to = mixed + i * width + column;
        const vint32 centered = (vint32)((vuint32)dots[s * count + i] - offset[i]);
        const vfloat own = __builtin_convertvector(centered, vfloat) * scale[i] * scales + minima * weight[i];
        STORE(to, LOAD(vfloat, to) * decay[i] + own);
      }
    }
  }
}
#endif
