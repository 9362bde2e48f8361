/* A decoder's float32 operations between its linear layers but attention, for one token, compiled once for each
 * level. NaN and infinity propagate: the next linear layer reports them. */
#ifndef MPQ_DECODER_OPS_H
#define MPQ_DECODER_OPS_H
#include <math.h>

#include "exponential.h"

INLINE float dot_product(const float *x, const float *y, int64_t count) {
  vfloat sums = {0};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sums += LOAD(vfloat, x + i) * LOAD(vfloat, y + i);
  float sum = sum16(sums);
  for (; i < count; i++) sum += x[i] * y[i];
  return sum;
}

/* Root mean square normalization (Zhang and Sennrich 2019, arXiv 1910.07467). */
static TARGET void normalize(const float *x, const float *weight, float epsilon, int64_t count, float *out) {
  const float factor = 1 / sqrtf(dot_product(x, x, count) / count + epsilon);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

/* gate = silu(gate) * up; `count` is a multiple of 16. */
static TARGET void activate(float *gate, const float *up, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const vfloat x = LOAD(vfloat, gate + i);
    STORE(gate + i, x / (1 + exponential(-x)) * LOAD(vfloat, up + i));
  }
}
#endif
