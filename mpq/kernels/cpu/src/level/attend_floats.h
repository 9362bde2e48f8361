/* Attention to a block of 64 tokens stored as floats, token after token. */
#ifndef MPQ_ATTEND_FLOATS_H
#define MPQ_ATTEND_FLOATS_H
#include "attend_codes.h"

/* The last, fewer than sixteen, columns of a token; zeros follow. */
INLINE vfloat load_tail(const int element, const int bytes, const uint8_t *from, int64_t count) {
  uint8_t some[64] = {0};
  memcpy(some, from, count * bytes);
  return load_any(element, some);
}

/* scores (count, 64) of `count` heads with the tokens `first` to `last`; the others are 0. */
INLINE void score_floats(const mpq_vectors *vectors, const uint8_t *rows, int first, int last, const float *q,
                         const int element, const int count, float *scores) {
  const int bytes = element == MPQ_SCALE_FP32 ? 4 : element == MPQ_SCALE_E4M3 ? 1 : 2;
  const int64_t width = vectors->width, padded = mpq_padded_width(vectors);
  memset(scores, 0, count * BLOCK * sizeof *scores);
  for (int token = first; token < last; token++) {
    const uint8_t *row = rows + token * width * bytes;
    vfloat sums[4];
    int64_t j = 0;
    for (int i = 0; i < count; i++) sums[i] = (vfloat){0};
    for (int64_t line = 0; line < width * bytes; line += 64) __builtin_prefetch(row + line + PREFETCH_L2_BYTES);
    for (; j + 16 <= width; j += 16) {
      const vfloat key = load_any(element, row + j * bytes);
      for (int i = 0; i < count; i++) sums[i] += key * LOAD(vfloat, q + i * padded + j);
    }
    if (j < width) {
      const vfloat key = load_tail(element, bytes, row + j * bytes, width - j);
      for (int i = 0; i < count; i++) sums[i] += key * LOAD(vfloat, q + i * padded + j);
    }
    for (int i = 0; i < count; i++) scores[i * BLOCK + token] = sum16(sums[i]);
  }
}

/* mixed (count, 16 * vectors columns) = mixed * decay + probabilities (count, 64) times the values of some tokens. */
INLINE void mix_columns(const mpq_vectors *values, const uint8_t *rows, int first, int last, const float *p,
                        const float *decay, const int element, const int count, const int vectors, int64_t tail, float *mixed) {
  const int bytes = element == MPQ_SCALE_FP32 ? 4 : element == MPQ_SCALE_E4M3 ? 1 : 2;
  const int64_t padded = mpq_padded_width(values);
  vfloat sums[4][2];
  for (int i = 0; i < count; i++)
    for (int v = 0; v < vectors; v++) sums[i][v] = LOAD(vfloat, mixed + i * padded + 16 * v) * decay[i];
  for (int token = first; token < last; token++) {
    const uint8_t *row = rows + token * values->width * bytes;
    __builtin_prefetch(row + PREFETCH_L2_BYTES);
    for (int v = 0; v < vectors; v++) {
      const uint8_t *from = row + 16 * v * bytes;
      const vfloat value = tail ? load_tail(element, bytes, from, tail) : load_any(element, from);
      for (int i = 0; i < count; i++) sums[i][v] += value * p[i * BLOCK + token];
    }
  }
  for (int i = 0; i < count; i++)
    for (int v = 0; v < vectors; v++) STORE(mixed + i * padded + 16 * v, sums[i][v]);
}

INLINE void mix_floats(const mpq_vectors *values, const uint8_t *rows, int first, int last, const float *p,
                       const float *decay, const int element, const int count, float *mixed) {
  const int bytes = element == MPQ_SCALE_FP32 ? 4 : element == MPQ_SCALE_E4M3 ? 1 : 2;
  const int64_t width = values->width;
  int64_t j = 0;
  for (; j + 32 <= width; j += 32)
    mix_columns(values, rows + j * bytes, first, last, p, decay, element, count, 2, 0, mixed + j);
  for (; j + 16 <= width; j += 16)
    mix_columns(values, rows + j * bytes, first, last, p, decay, element, count, 1, 0, mixed + j);
  if (j < width) mix_columns(values, rows + j * bytes, first, last, p, decay, element, count, 1, width - j, mixed + j);
}
#endif
