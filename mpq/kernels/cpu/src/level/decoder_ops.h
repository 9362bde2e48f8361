/* A decoder's float32 operations between its linear layers, for one token, compiled once for each level. NaN and
 * infinity propagate: the next linear layer reports them. */
#ifndef MPQ_DECODER_OPS_H
#define MPQ_DECODER_OPS_H
#include <math.h>

#include "common.h"



/* Horizontal sum in a fixed order, so that all levels agree to the bit. */
INLINE float sum16(vfloat x) {
  typedef float half __attribute__((vector_size(32)));
  typedef float quarter __attribute__((vector_size(16)));
  half halves[2];
  memcpy(halves, &x, sizeof x);
  halves[0] += halves[1];
  quarter quarters[2];
  memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

INLINE float dot_product(const float *x, const float *y, int64_t count) {
  vfloat sums = {0};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sums += LOAD(vfloat, x + i) * LOAD(vfloat, y + i);
  float sum = sum16(sums);
  for (; i < count; i++) sum += x[i] * y[i];
  return sum;
}

/* e**x to about 2**-22 relative, clamped to 2**-126 .. 2**127; NaN for a non-finite input. */
INLINE vfloat exponential(vfloat x) {
  const vint32 below = x < -87.f, above = x > 88.f;
  const vint32 least = below & (vint32)((vfloat){0} - 87.f), most = above & (vint32)((vfloat){0} + 88.f);
  const vfloat inside = (vfloat)(((vint32)x & ~(below | above)) | least | most);
  const vfloat rounded = inside * 0x1.715476p0f + 0x1.8p23f, whole = rounded - 0x1.8p23f;
  const vfloat rest = inside - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  vfloat power = rest * (1 / 720.f) + 1 / 120.f;
  power = power * rest + 1 / 24.f;
  power = power * rest + 1 / 6.f;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1;
  return (vfloat)((vint32)power + ((vint32)rounded << 23)) + (x - x);
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

INLINE vfloat load_floats(const void *from, const int is_bf16, int64_t i) {
  if (!is_bf16) return LOAD(vfloat, (const float *)from + i);
  return (vfloat)(__builtin_convertvector(LOAD(vuint16, (const uint16_t *)from + i), vuint32) << 16);
}

INLINE float load_number(const void *from, const int is_bf16, int64_t i) {
  if (!is_bf16) return ((const float *)from)[i];
  const uint32_t word = (uint32_t)((const uint16_t *)from)[i] << 16;
  return LOAD(float, &word);
}

/* Scaled dot products of `count` heads with every key: scores (count, stride). */
INLINE void score_keys(const mpq_attention *attention, const float *q, const int is_bf16, int64_t start, const int count,
                       float *scores, int64_t stride) {
  const int64_t width = attention->width;
  const float scale = 1 / sqrtf(width);
  for (int64_t i = 0; i < attention->length; i++, start += width) {
    vfloat sums[4];
    int64_t j = 0;
    for (int head = 0; head < count; head++) sums[head] = (vfloat){0};
    for (; j + 16 <= width; j += 16) {
      const vfloat key = load_floats(attention->keys, is_bf16, start + j);
      for (int head = 0; head < count; head++) sums[head] += key * LOAD(vfloat, q + head * width + j);
    }
    for (int head = 0; head < count; head++) {
      float sum = sum16(sums[head]);
      for (int64_t k = j; k < width; k++) sum += load_number(attention->keys, is_bf16, start + k) * q[head * width + k];
      scores[head * stride + i] = sum * scale;
    }
  }
}

/* Softmax numerators of one head, zero-padded to whole vectors; returns the denominator. */
INLINE float softmax_numerators(float *scores, int64_t length, int64_t stride) {
  for (int64_t i = length; i < stride; i++) scores[i] = scores[0];
  vfloat largest = LOAD(vfloat, scores), total = {0};
  for (int64_t i = 16; i < stride; i += 16) {
    const vfloat x = LOAD(vfloat, scores + i);
    const vint32 above = x > largest;
    largest = (vfloat)(((vint32)x & above) | ((vint32)largest & ~above));
  }
  float most = largest[0];
  for (int i = 1; i < 16; i++) most = largest[i] > most ? largest[i] : most;
  for (int64_t i = 0; i < stride; i += 16) STORE(scores + i, exponential(LOAD(vfloat, scores + i) - most));
  for (int64_t i = length; i < stride; i++) scores[i] = 0;
  for (int64_t i = 0; i < stride; i += 16) total += LOAD(vfloat, scores + i);
  return sum16(total);
}

/* Weighted mean of the values for `count` heads, 16 * `vectors` columns from `start` on. */
INLINE void weighted_mean(const mpq_attention *attention, const float *scores, int64_t stride, const float *totals,
                          const int is_bf16, int64_t start, const int count, const int vectors, float *out) {
  vfloat sums[4][2];
  for (int i = 0; i < count * vectors; i++) sums[i / vectors][i % vectors] = (vfloat){0};
  for (int64_t i = 0; i < attention->length; i++, start += attention->width)
    for (int vector = 0; vector < vectors; vector++) {
      const vfloat value = load_floats(attention->values, is_bf16, start + 16 * vector);
      for (int head = 0; head < count; head++) sums[head][vector] += value * scores[head * stride + i];
    }
  for (int head = 0; head < count; head++)
    for (int vector = 0; vector < vectors; vector++)
      STORE(out + head * attention->width + 16 * vector, sums[head][vector] / totals[head]);
}

INLINE void attend_heads(const mpq_attention *attention, int64_t head, int64_t start, const int is_bf16, const int count,
                         float *scores) {
  const int64_t width = attention->width, stride = (attention->length + 15) / 16 * 16;
  float totals[4], *out = attention->out + head * width;
  score_keys(attention, attention->q + head * width, is_bf16, start, count, scores, stride);
  for (int i = 0; i < count; i++) totals[i] = softmax_numerators(scores + i * stride, attention->length, stride);
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) weighted_mean(attention, scores, stride, totals, is_bf16, start + j, count, 2, out + j);
  for (; j + 16 <= width; j += 16) weighted_mean(attention, scores, stride, totals, is_bf16, start + j, count, 1, out + j);
  for (; j < width; j++)
    for (int i = 0; i < count; i++) {
      float sum = 0;
      for (int64_t k = 0; k < attention->length; k++)
        sum += load_number(attention->values, is_bf16, start + k * width + j) * scores[i * stride + k];
      out[i * width + j] = sum / totals[i];
    }
}

/* Attention of the query heads that share a key head. `scores` holds four heads, each padded to whole vectors. */
static TARGET void attend(const mpq_attention *attention, int64_t key_head, float *scores) {
  const int64_t group = attention->heads / attention->key_heads, start = key_head * attention->capacity * attention->width;
  int64_t head = key_head * group, end = head + group;
  for (; head + 4 <= end; head += 4)
    if (attention->is_bf16) attend_heads(attention, head, start, 1, 4, scores);
    else attend_heads(attention, head, start, 0, 4, scores);
  for (; head < end; head++)
    if (attention->is_bf16) attend_heads(attention, head, start, 1, 1, scores);
    else attend_heads(attention, head, start, 0, 1, scores);
}

static const mpq_decoder_ops decoder_ops = {normalize, activate, attend};
#endif
